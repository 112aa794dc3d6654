"""NVIDIA DALI: one decode per image, one slice and resize per view, on the GPU if there is one.

On a CPU DALI decodes and torch resizes all but small crops: DALI's own resize takes five times as long there.

DALI draws no random numbers, lists no files and rotates no images here: plans define the crops, and `decode.decode` the
pixels of an image. Bytes that DALI would decode differently are decoded on the host and passed as uncompressed PPM.

B images · V views · S side of a crop in pixels · H, W height and width of the upright image
"""

from __future__ import annotations

import textwrap
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.resize import resize_boxes
from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex
from pipelines.data.plain_jpeg import COLUMNS_REVERSED, ROWS_REVERSED, TRANSPOSED, plain_jpeg, stored_box
from pipelines.errors import BackendMissingError, DataError
from pipelines.transfer import to_device
from pipelines.views import BatchPlan, Crops

# Share of the baseline JPEGs decoded by the GPU's JPEG engines, if it has them (A100 and later data-centre GPUs). CUDA
# cores, fed by `workers` host threads, decode the rest at the same time. DALI's default of 0.65 loads the host more.
HARDWARE_SHARE = 0.9
SMALL_SIDE = 48  # pixels: up to this size the call overhead of torch's resize exceeds the time of DALI's
READERS = 8  # threads that read files: they wait for the disk, not the CPU
FILES_PER_TASK = 64  # submitting a task costs as much as reading a small file


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
        self._resize_by_dali = default if resize_by_dali is None else resize_by_dali

    def crops(self, plans: Iterable[BatchPlan]) -> Generator[Crops, None, None]:
        """The first plan must be the largest. Raises DataError for an image that `decode.decode` or DALI rejects."""
        plans = iter(plans)
        first = next(plans, None)
        if first is None:
            return
        readers = ThreadPoolExecutor(min(READERS, self._threads), "read")
        try:
            batches = _Batches(self._index, first, plans, readers, corners=self._resize_by_dali)
            pipeline = self._pipeline(batches, *first.boxes.shape[:2])
            while (outputs := self._run(pipeline, batches)) is not None:
                batch = batches.issued.popleft()
                yield Crops(self._take(outputs, batch), batch.plan)
        finally:
            readers.shutdown(cancel_futures=True)

    def _pipeline(self, batches: _Batches, views: int, batch_size: int) -> Any:
        dali = _dali()
        fn, types = dali.fn, dali.types
        cuda = self._device.type == "cuda"
        device_id = None
        if cuda:
            device_id = torch.cuda.current_device() if self._device.index is None else self._device.index
        # Two batches in DALI's queue: one is decoded while the previous one is copied and trained on.
        pipeline = dali.Pipeline(
            batch_size=batch_size, num_threads=self._threads, device_id=device_id, prefetch_queue_depth=2, seed=0
        )
        in_memory, numbers = self._index.pixels is not None, 2 * views if self._resize_by_dali else 0
        with pipeline:
            source, *corners = fn.external_source(
                source=batches,
                num_outputs=1 + numbers,
                batch=True,
                dtype=[types.UINT8] + [types.INT32] * numbers,
                ndim=[3 if in_memory else 1] + [1] * numbers,
                layout=["HWC" if in_memory else ""] + [""] * numbers,
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
                f"driver (pip install 'fastmoco[dali]' for CUDA 13, 'fastmoco[dali-cu12]' for 12), or use "
                f"--pipeline torch"
            ) from error
        return pipeline

    def _run(self, pipeline: Any, batches: _Batches) -> Any:
        """The outputs of the next batch, complete; None after the last."""
        try:
            return pipeline.run()
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

    def _take(self, outputs: Any, batch: _Batch) -> Tensor:
        """The crops, (V, B, S, S, 3) uint8, upright, copied from DALI's buffers, which it reuses."""
        images = torch.empty(
            (*batch.boxes.shape[:2], self._side, self._side, 3), dtype=torch.uint8, device=self._device
        )
        if self._resize_by_dali:
            stream = torch.cuda.current_stream(self._device) if images.is_cuda else None
            for view, output in zip(images, outputs, strict=True):
                _dali().feed_ndarray(output.as_tensor(), view, cuda_stream=stream)
            if stream is not None:
                stream.synchronize()  # the copy is short, and DALI's streams are not ordered with ours
        else:
            (decoded,) = outputs
            pixels = [torch.from_dlpack(decoded[row]) for row in range(len(decoded))]
            resize_boxes(pixels, batch.boxes, images)
        for orientation in np.unique(batch.orientations[batch.orientations > 1]).tolist():
            rows = to_device(np.flatnonzero(batch.orientations == orientation), self._device)
            images[:, rows] = _upright(images[:, rows], orientation)
        return images

    def close(self) -> None:
        """Nothing to release: pipelines and threads belong to the iterators."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """A plan whose images were passed to DALI.

    boxes         (V, B, 4) int32, in the images as stored
    orientations  (B,) uint8, EXIF orientation of the crops; 1 if upright
    """

    plan: BatchPlan
    boxes: np.ndarray
    orientations: np.ndarray


class _Batches:
    """DALI's external source: batches as [images, and with `corners` a corner and an extent (B, 2) int32 per view].

    Images are B arrays of encoded bytes, or (B, H, W, 3) pixels. Files are read one batch ahead of DALI's requests.
    """

    def __init__(
        self,
        index: ImageIndex,
        first: BatchPlan,
        rest: Iterator[BatchPlan],
        readers: ThreadPoolExecutor,
        corners: bool,
    ) -> None:
        self._index, self._plans, self._readers, self._corners = index, rest, readers, corners
        self._shape = first.boxes.shape[:2]
        self._reading = self._start(first)
        self.issued: deque[_Batch] = deque()

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> list[Any]:
        if self._reading is None:
            raise StopIteration
        (plan, boxes, orientations), chunks = self._reading
        self._reading = self._start(next(self._plans, None))
        if self._index.pixels is not None:
            images = self._index.pixels[plan.indices]
        else:
            images = [image for chunk in chunks for image in chunk.result()]
        self.issued.append(_Batch(plan, boxes, orientations))
        if not self._corners:
            return [images]
        corners = [np.ascontiguousarray(view[:, half]) for view in boxes for half in (slice(0, 2), slice(2, 4))]
        return [images, *corners]

    def _start(self, plan: BatchPlan | None) -> tuple[tuple[BatchPlan, np.ndarray, np.ndarray], list[Future]] | None:
        if plan is None:
            return None
        views, count = plan.boxes.shape[:2]
        assert views == self._shape[0], "plans of one iterator have the same views"
        assert count <= self._shape[1], "the first plan of an iterator is the largest"
        boxes, orientations = plan.boxes.copy(), np.ones(count, dtype=np.uint8)
        starts = range(0, count, FILES_PER_TASK) if self._index.pixels is None else ()
        chunks = [self._readers.submit(self._read, plan, boxes, orientations, start) for start in starts]
        return (plan, boxes, orientations), chunks

    def _read(self, plan: BatchPlan, boxes: np.ndarray, orientations: np.ndarray, start: int) -> list[np.ndarray]:
        """Encoded bytes of `FILES_PER_TASK` images, one array each; writes `orientations` and the boxes they change."""
        images = []
        for row in range(start, min(start + FILES_PER_TASK, len(orientations))):
            image = int(plan.indices[row])
            try:
                data = self._index.read_bytes(image)
            except DataError:
                if not self._index.is_encoded(image):
                    raise
                data = b""  # `read` reports what is wrong with the file, or replaces the image
            header = plain_jpeg(data)
            if header is None or header.upright_size != tuple(self._index.sizes[image].tolist()):
                data = _ppm(self._index.read(image))
            elif header.orientation != 1:
                orientations[row] = header.orientation
                boxes[:, row] = stored_box(boxes[:, row], header)
            images.append(np.frombuffer(data, dtype=np.uint8))
        return images


def _ppm(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 → an uncompressed file, which every decoder reads exactly."""
    return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


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
        from nvidia.dali.plugin.pytorch import feed_ndarray
    except ImportError as error:
        raise BackendMissingError(
            f"--pipeline dali needs NVIDIA DALI, which cannot be imported ({_one_line(error)}): "
            f"pip install 'fastmoco[dali]', or use --pipeline torch"
        ) from error
    return SimpleNamespace(Pipeline=Pipeline, fn=fn, types=types, feed_ndarray=feed_ndarray)


def _one_line(error: Exception) -> str:
    """The readable part of a message that may contain a stack trace."""
    return printable(textwrap.shorten(str(error), 200, placeholder=" …"))
