"""Crops from a `.beton` file: each image is read and decoded once and cropped for every view, in compiled code.

Of FFCV this takes the file format and, from its compiled library, libjpeg-turbo. Its Python package is not imported:
that takes 5 s and sets the thread counts of torch and numba to 1. Its Loader is left out: it wants one batch size,
compiles anew in every process, fixes the order before the first batch, and returns whatever pixels a damaged file
gives. Here threads take a few images at a time through `backends.ffcv_kernel`, without the interpreter lock, and
a JPEG that libjpeg-turbo remarks on is decoded again by `pipelines.data.decode`, which has the last word.

V views · B images a batch · S side of a crop
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.machinery import PathFinder
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError, DataError
from pipelines.views import BatchPlan, Crops

AHEAD = 3  # batches in work: one that is waited for, and enough behind it for the threads never to stand idle
TASK_IMAGES = 8  # a task of 224 px photographs takes 4 ms: long to hand over, short against a batch
INSTALL = (
    "install it with `apt-get install pkg-config libopencv-dev libturbojpeg0-dev` and `pip install 'fastmoco[ffcv]'`"
)


class FfcvCrops:
    """A crop source over the records of an index that was read from a `.beton` file, with `workers` threads.

    Raises BackendMissingError without FFCV, and DataError for an index that is not from a `.beton` file.
    """

    def __init__(self, index: ImageIndex, side: int, device: torch.device, workers: int) -> None:
        if index.records is None or not index.records.in_beton:
            raise DataError(
                f"--pipeline ffcv reads .beton files, and {printable(index.name)} is not one: convert it with "
                f"`python tools/make_ffcv.py DATA OUT.beton`, and train on that"
            )
        self._library = _Library()
        self._index, self._records, self._side, self._device = index, index.records, side, device
        try:
            self._file = os.open(index.records.paths[0], os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot read {printable(index.records.paths[0])}: {error.strerror}") from error
        self._memory = _Memory(pinned=device.type == "cuda")
        self._decoders: list[_Decoder] = []  # not in use
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="crops")

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        """Raises DataError for an image that cannot be read."""
        plans = iter(plans)
        waiting: deque[_Batch] = deque()
        try:
            while True:
                for plan in islice(plans, AHEAD - len(waiting)):
                    waiting.append(self._start(plan))
                if not waiting:
                    return
                batch = waiting.popleft()
                try:
                    for task in batch.tasks:
                        task.result()
                except BaseException:
                    batch.cancel()
                    raise
                yield Crops(batch.images.to(self._device, non_blocking=True), batch.plan)
        finally:
            for batch in waiting:
                batch.cancel()

    def _start(self, plan: BatchPlan) -> _Batch:
        views, count = plan.boxes.shape[:2]
        shape = (views, count, self._side, self._side, 3)
        images = self._memory.take(shape)
        crops = images.numpy().reshape(views, count, self._side, 3 * self._side)
        tasks = [self._pool.submit(self._crop, plan, first, crops) for first in range(0, count, TASK_IMAGES)]
        return _Batch(plan, images, tasks)

    def _crop(self, plan: BatchPlan, first: int, out: np.ndarray) -> None:
        from pipelines.backends.ffcv_kernel import DONE, crop, crop_task

        rows = slice(first, first + TASK_IMAGES)
        chosen = plan.indices[rows]
        sizes, raw, lengths = self._index.sizes[chosen], self._records.raw[chosen], self._records.lengths[chosen]
        boxes = np.ascontiguousarray(plan.boxes[:, rows])
        status = np.empty(len(chosen), dtype=np.uint8)
        try:
            decoder = self._decoders.pop()
        except IndexError:
            decoder = _Decoder(self._library)
        try:
            decoder.hold(int(lengths[~raw].max(initial=1)), 3 * int(sizes.astype(np.int64).prod(axis=1).max()))
            calls = np.array([*self._library.addresses, decoder.handle, self._file], dtype=np.int64)
            offsets = self._records.offsets[chosen]
            crop_task(calls, raw, offsets, lengths, sizes, boxes, decoder.encoded, decoder.pixels, out, first, status)
        finally:
            self._decoders.append(decoder)
        for row in np.flatnonzero(status != DONE).tolist():
            pixels = self._index.read(int(chosen[row]))  # raises DataError where the image is bad
            height, width = pixels.shape[:2]
            for view in range(len(boxes)):
                crop(pixels.reshape(-1), height, width, boxes[view, row], out[view, first + row])

    def close(self) -> None:
        """Ends the threads once their present tasks are done; iterators in use cannot be continued."""
        self._pool.shutdown(cancel_futures=True)
        while self._decoders:
            self._decoders.pop().close()
        self._memory.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class _Batch:
    """A plan, the crops it will have, and the tasks that fill them."""

    def __init__(self, plan: BatchPlan, images: Tensor, tasks: list[Future[None]]) -> None:
        self.plan, self.images, self.tasks = plan, images, tasks

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class _Memory:
    """Host memory for batches, used again once nobody holds the batch that was in it.

    Torch does so itself with pinned memory. Elsewhere the C library gives such large blocks back to the system, and
    the pages of new ones, zeroed one by one, cost a third of the time of decoding and cropping at 224 px.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[tuple[int, ...], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised uint8 tensor."""
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        free = self._free.setdefault(shape, [])
        block = free.pop() if free else np.empty(shape, dtype=np.uint8)
        lease = block[:]  # lives as long as any tensor that looks into it
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease)

    def close(self) -> None:
        self._free.clear()


class _Library:
    """libjpeg-turbo as FFCV's compiled library links it, and pread: addresses for compiled code."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ffcv")
        found = spec and PathFinder.find_spec("_libffcv", spec.submodule_search_locations)
        if not found or not found.origin:
            raise BackendMissingError(f"--pipeline ffcv needs FFCV, which is not installed: {INSTALL}")
        try:
            import pipelines.backends.ffcv_kernel  # noqa: F401 - needs numba, which FFCV brings
        except RuntimeError as error:  # that is how numba says it
            raise BackendMissingError(
                "numba finds no folder to keep compiled code in; set NUMBA_CACHE_DIR to one that can be written to"
            ) from error
        except ImportError as error:
            raise BackendMissingError(
                f"--pipeline ffcv needs numba ({error}), which comes with FFCV: {INSTALL}"
            ) from error
        try:
            library = ctypes.CDLL(found.origin)
            self.start, self.end = library.tjInitDecompress, library.tjDestroy
            names = (ctypes.CDLL(None).pread, library.tjDecompressHeader3, library.tjDecompress2)
        except (OSError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise BackendMissingError(f"--pipeline ffcv cannot load FFCV ({reason}): {INSTALL}") from error
        self.start.restype, self.end.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self.addresses = [ctypes.cast(name, ctypes.c_void_p).value for name in names]


class _Decoder:
    """A decompressor of libjpeg-turbo and its scratch memory, for one thread at a time."""

    def __init__(self, library: _Library) -> None:
        self._end = library.end
        self.handle = library.start()
        if not self.handle:
            raise MemoryError("libjpeg-turbo has no memory for a decompressor")
        self.encoded = self.pixels = np.empty(0, dtype=np.uint8)

    def hold(self, encoded_bytes: int, pixel_bytes: int) -> None:
        """Make room. Memory that is not written to costs nothing, so it grows by more than is asked for."""
        if len(self.encoded) < encoded_bytes:
            self.encoded = np.empty(2 * encoded_bytes, dtype=np.uint8)
        if len(self.pixels) < pixel_bytes:
            self.pixels = np.empty(2 * pixel_bytes, dtype=np.uint8)

    def close(self) -> None:
        self._end(self.handle)
        self.handle = None
