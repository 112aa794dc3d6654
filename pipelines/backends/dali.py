"""NVIDIA DALI: one decode per image, one slice and resize per view, on the GPU if there is one.

On a CPU DALI decodes and torch resizes all but small crops: DALI's own resize takes five times as long there.

DALI draws no random numbers, lists no files and rotates no images here: plans define the crops, and `decode.decode` the
pixels of an image. Bytes that DALI would decode differently are decoded on the host and passed as uncompressed PPM.

B images · V views · S side of a crop in pixels · H, W height and width of the upright image
"""

from __future__ import annotations

import textwrap
from collections.abc import Generator, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.resize import resize_boxes
from pipelines.backends.dali_batches import DaliBatch, DaliBatches
from pipelines.backends.torch import TorchCrops
from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex
from pipelines.data.plain_jpeg import COLUMNS_REVERSED, ROWS_REVERSED, TRANSPOSED, JpegHeaders
from pipelines.errors import BackendMissingError, DataError, how_to_install
from pipelines.transfer import to_device
from pipelines.views import BatchPlan, Crops

# Share of the baseline JPEGs decoded by the GPU's JPEG engines, if it has them (A100 and later data-centre GPUs). CUDA
# cores, fed by `workers` host threads, decode the rest at the same time. DALI's default of 0.65 loads the host more.
HARDWARE_SHARE = 0.9
SMALL_SIDE = 48  # pixels: up to this size the call overhead of torch's resize exceeds the time of DALI's
PREFETCHED = 2  # batches in DALI: one is decoded while the previous one is copied and trained on


class DaliCrops:
    """A crop source on DALI. `workers` host threads decode (on the CPU) or feed the GPU's decoders (on CUDA).

    Every iterator has its own pipeline, freed with it. DALI's resize equals Pillow's and torchvision's except for the
    outermost pixels of a reduced crop: where the triangle extends beyond the box, DALI repeats the box's edge, while
    the others omit that part of the triangle (at most 1/8 of the weight per axis).

    resize_by_dali  rather than by torch; by default on CUDA, for small crops, and for images in memory

    Raises BackendMissingError if DALI is not installed.
    """

    def __init__(
        self, index: ImageIndex, side: int, device: torch.device, workers: int, resize_by_dali: bool | None = None
    ) -> None:
        _dali()
        self._index, self._side, self._device, self._threads = index, side, device, max(1, workers)
        default = device.type == "cuda" or side <= SMALL_SIDE or index.pixels is not None
        self._headers = JpegHeaders(index.sizes)
        self._resize_by_dali = default if resize_by_dali is None else resize_by_dali

    def crops(self, plans: Iterable[BatchPlan]) -> Generator[Crops, None, None]:
        """The first plan must be the largest. Raises DataError for an image that `decode.decode` or DALI rejects.

        At most `PREFETCHED` batches are in DALI, and one is being read, besides the one that is yielded.
        """
        plans = iter(plans)
        first = next(plans, None)
        if first is None:
            return
        if first.shorter:  # DALI does not resize to torchvision's grid
            yield from TorchCrops(self._index, self._side, self._device, self._threads).crops(chain([first], plans))
            return
        dali = _dali()
        batches = DaliBatches(
            self._index,
            self._headers,
            first,
            plans,
            threads=self._threads,
            corners=self._resize_by_dali,
            as_tensor=dali.TensorCPU,
            as_list=partial(dali.TensorListCPU, contiguous=False),
        )
        try:
            yield from self._crops(batches, *first.boxes.shape[:2])
        finally:
            batches.close()
            if self._device.type == "cuda":  # the pipeline is gone, but DALI keeps its memory, out of reach of torch
                dali.ReleaseUnusedMemory()

    def _crops(self, batches: DaliBatches, views: int, batch_size: int) -> Generator[Crops, None, None]:
        pipeline = self._pipeline(batches, views, batch_size)
        yield from iter(partial(self._next, pipeline, batches), None)  # holds no crops, unlike a loop

    def _next(self, pipeline: Any, batches: DaliBatches) -> Crops | None:
        """The crops of the next batch; None after the last."""
        outputs = self._run(pipeline, batches)
        if outputs is None:
            return None
        batch = batches.issued.popleft()
        return Crops(self._take(outputs, batch), batch.plan)

    def _pipeline(self, batches: DaliBatches, views: int, batch_size: int) -> Any:
        dali = _dali()
        fn, types = dali.fn, dali.types
        cuda = self._device.type == "cuda"
        device_id = None
        if cuda:
            device_id = torch.cuda.current_device() if self._device.index is None else self._device.index
        pipeline = dali.Pipeline(
            batch_size=batch_size,
            num_threads=self._threads,
            device_id=device_id,
            prefetch_queue_depth=PREFETCHED,
            seed=0,
        )
        in_memory, numbers = self._index.pixels is not None, 2 * views if self._resize_by_dali else 0
        with pipeline:
            source, *corners = fn.external_source(
                source=batches,
                num_outputs=1 + numbers,
                batch=True,
                dtype=[types.UINT8] + [types.INT32] * numbers,
                ndim=[3 if in_memory else 1] + [1] * numbers,
                layout=["HWC"] if in_memory else None,
                no_copy=True,  # `DaliBatch.inputs` lives long enough
            )
            if in_memory:
                images = source.gpu() if cuda else source
            else:
                images = fn.decoders.image(
                    source,
                    device="mixed" if cuda else "cpu",
                    output_type=types.RGB,
                    adjust_orientation=False,  # boxes are transformed instead: see `stored_box`
                    jpeg_fancy_upsampling=True,  # interpolates chroma like libjpeg-turbo
                    hw_decoder_load=HARDWARE_SHARE,
                    affine=False,  # else the threads of every pipeline and rank are pinned to the same first cores
                )
            crops = [
                fn.resize(
                    fn.slice(images, corner, extent, axes=(0, 1)),
                    size=(self._side, self._side),
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                for corner, extent in zip(corners[::2], corners[1::2], strict=True)
            ]
            pipeline.set_outputs(*(crops or [images]))
        try:
            pipeline.build()
        except RuntimeError as error:  # a driver older than this DALI, or no device
            raise BackendMissingError(
                f"--pipeline dali cannot start on {self._device} ({_one_line(error)}); install the DALI made for your "
                f"driver (in a checkout of fastmoco {how_to_install('dali')} for CUDA 13, --extra dali-cu12 for 12), "
                "or use --pipeline torch"
            ) from error
        return pipeline

    def _run(self, pipeline: Any, batches: DaliBatches) -> Any:
        """The outputs of the next batch; None after the last. On CUDA they are ordered in the current stream."""
        try:
            return pipeline.run(self._stream()) if self._device.type == "cuda" else pipeline.run()
        except StopIteration:
            return None
        except DataError:
            raise
        except Exception as error:  # DALI's own type; the pipeline is unusable after it
            strict = replace(self._index, ledger=None)
            for batch in batches.issued:
                for image in batch.plan.indices.tolist():
                    strict.read(image)  # raises for the image at fault
            if "decode" not in str(error):
                raise
            raise DataError(
                f"DALI cannot decode an image that other decoders can; use --pipeline torch ({_one_line(error)})"
            ) from error

    def _take(self, outputs: Any, batch: DaliBatch) -> Tensor:
        """The crops, (V, B, S, S, 3) uint8, upright, copied from DALI's buffers.

        On CUDA the host waits for nothing. The copy waits on the device for DALI's stream, and then DALI's stream for
        the copy, so that DALI reuses a buffer after it has been read. (DLPack alone would give only the first half:
        DALI takes memory back as soon as the host lets go of it.)
        """
        images = torch.empty(
            (*batch.boxes.shape[:2], self._side, self._side, 3), dtype=torch.uint8, device=self._device
        )
        if self._resize_by_dali:
            stream = self._stream() if self._device.type == "cuda" else None
            for view, output in zip(images, outputs, strict=True):
                _dali().feed_ndarray(output.as_tensor(), view, cuda_stream=stream)
        else:
            (decoded,) = outputs
            pixels = [torch.from_dlpack(decoded[row]) for row in range(len(decoded))]
            resize_boxes(pixels, batch.boxes, images)
        for orientation in np.unique(batch.orientations[batch.orientations > 1]).tolist():
            rows = to_device(np.flatnonzero(batch.orientations == orientation), self._device)
            images[:, rows] = _upright(images[:, rows], orientation)
        return images

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def close(self) -> None:
        """Nothing to release: pipelines and threads belong to the iterators."""


def _upright(crops: Tensor, orientation: int) -> Tensor:
    """(..., S, S, 3) as stored → upright. The resize filter is symmetric, so resizing and rotating commute."""
    if orientation in TRANSPOSED:
        crops = crops.transpose(-3, -2)
    axes = [axis for axis, reversed_ in ((-3, ROWS_REVERSED), (-2, COLUMNS_REVERSED)) if orientation in reversed_]
    return crops.flip(axes) if axes else crops


def _dali() -> SimpleNamespace:
    """The used names of DALI. Raises BackendMissingError with the install command if it cannot be imported."""
    try:
        from nvidia.dali import Pipeline, fn, types
        from nvidia.dali.backend import ReleaseUnusedMemory  # pyright: ignore[reportAttributeAccessIssue]
        from nvidia.dali.plugin.pytorch import feed_ndarray
        from nvidia.dali.tensors import TensorCPU, TensorListCPU
    except ImportError as error:
        raise BackendMissingError(
            f"--pipeline dali needs NVIDIA DALI, which cannot be imported ({_one_line(error)}): "
            f"in a checkout of fastmoco {how_to_install('dali')}, or use --pipeline torch"
        ) from error
    return SimpleNamespace(
        Pipeline=Pipeline,
        fn=fn,
        types=types,
        feed_ndarray=feed_ndarray,
        ReleaseUnusedMemory=ReleaseUnusedMemory,
        TensorCPU=TensorCPU,
        TensorListCPU=TensorListCPU,
    )


def _one_line(error: Exception) -> str:
    """The readable part of a message that may contain a stack trace."""
    return printable(textwrap.shorten(str(error), 200, placeholder=" …"))
