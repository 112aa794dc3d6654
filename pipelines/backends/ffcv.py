"""Crops from a `.beton` file: each image is read and decoded once and cropped for every view, in compiled code.

This uses FFCV's file format and libjpeg-turbo from its compiled library. Its Python package is not imported: that takes
5 s and sets the thread counts of torch and numba to 1. Its Loader is not used: it needs one batch size, compiles again
in every process, fixes the order before the first batch, and returns wrong pixels for a damaged file. Here threads
process a few images at a time in `backends.ffcv_kernel`, without the interpreter lock. A JPEG for which libjpeg-turbo
warns is decoded again by `pipelines.data.decode`, whose result is used.

V views · B images per batch · S side of a crop
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
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from pipelines.backends.torch import TorchCrops
from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError, DataError, how_to_install
from pipelines.platforms import read_at
from pipelines.reads import Timed, open_regular
from pipelines.transfer import wait_for
from pipelines.views import BatchPlan, Crops

AHEAD = 3  # batches in progress: the one that is waited for, and enough after it to keep the threads busy
TASK_IMAGES = 8  # 224 px photographs take 4 ms per task: long against its overhead, short against a batch
INSTALL = (
    "install it with `apt-get install pkg-config libopencv-dev libturbojpeg0-dev` and, in a checkout of fastmoco, "
    f"`{how_to_install('ffcv')}`"
)


class FfcvCrops:
    """A crop source over an index that was read from a `.beton` file, with `workers` threads.

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
        self._workers = workers
        try:
            self._file, _ = open_regular(index.records.paths[0])
        except OSError as error:
            raise DataError(f"cannot read {printable(index.records.paths[0])}: {error.strerror or error}") from error
        self._memory = _Memory(pinned=device.type == "cuda")
        self._decoders: list[_Decoder] = []  # idle ones
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="crops")

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        """Raises DataError for an image that cannot be read."""
        plans = iter(plans)
        first = next(plans, None)
        if first is None:
            return
        plans = chain([first], plans)
        if first.shorter:
            yield from TorchCrops(self._index, self._side, self._device, self._workers).crops(plans)
            return
        waiting: deque[_Batch] = deque()
        copied: deque[torch.cuda.Event] = deque()
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
                images = batch.images.to(self._device, non_blocking=True)
                if images.is_cuda:  # the host may be ahead, and page-locked memory is in use until it is copied
                    copied.append(torch.cuda.Event())
                    copied[-1].record(torch.cuda.current_stream(self._device))
                    if len(copied) > AHEAD:
                        wait_for(copied.popleft())
                yield Crops(images, batch.plan)
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
            decoder.reserve(int(lengths[~raw].max(initial=1)), 3 * int(sizes.astype(np.int64).prod(axis=1).max()))
            calls = np.array([*self._library.addresses, decoder.handle, self._file], dtype=np.int64)
            offsets = self._records.offsets[chosen]
            with Timed(self._records.paths[0]):
                crop_task(
                    calls, raw, offsets, lengths, sizes, boxes, decoder.encoded, decoder.pixels, out, first, status
                )
        finally:
            self._decoders.append(decoder)
        for row in np.flatnonzero((status != DONE) | self._damaged(chosen)).tolist():
            pixels = self._index.read(int(chosen[row]))  # raises DataError where the image is bad
            height, width = pixels.shape[:2]
            for view in range(len(boxes)):
                crop(pixels.reshape(-1), height, width, boxes[view, row], out[view, first + row])

    def _damaged(self, chosen: np.ndarray) -> np.ndarray:
        """Which of these images are not known to be those that were written: each is hashed when it is first read."""
        damaged = np.zeros(len(chosen), dtype=bool)
        if self._records.digests is not None:
            for row in np.flatnonzero(~self._records.digests.checked[chosen]).tolist():
                image = int(chosen[row])
                with Timed(self._records.paths[0]):
                    data = read_at(self._file, int(self._records.lengths[image]), int(self._records.offsets[image]))
                damaged[row] = not self._records.digests.is_intact(image, data)
        return damaged

    def close(self) -> None:
        """Stops the threads after their current tasks; open iterators cannot be continued."""
        self._pool.shutdown(cancel_futures=True)
        while self._decoders:
            self._decoders.pop().close()
        self._memory.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class _Batch:
    """A plan, the memory for its crops, and the tasks that fill it."""

    def __init__(self, plan: BatchPlan, images: Tensor, tasks: list[Future[None]]) -> None:
        self.plan, self.images, self.tasks = plan, images, tasks

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class _Memory:
    """Host memory for batches, reused once the batch in it is no longer referenced.

    torch caches pinned memory itself. For other memory, the C library returns such large blocks to the system, and
    zeroing the pages of new ones costs a third of the time of decoding and cropping at 224 px.
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
        lease = block[:]  # lives as long as any tensor that refers to it
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease)

    def close(self) -> None:
        self._free.clear()


class _Library:
    """Addresses of libjpeg-turbo's functions, from FFCV's compiled library, and of pread."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("ffcv")
        module = spec and PathFinder.find_spec("_libffcv", spec.submodule_search_locations)
        if not module or not module.origin:
            raise BackendMissingError(f"--pipeline ffcv needs FFCV, which is not installed: {INSTALL}")
        try:
            import pipelines.backends.ffcv_kernel  # noqa: F401 - needs numba, which FFCV brings
        except RuntimeError as error:  # numba's own error for this
            raise BackendMissingError(
                "numba has no writable folder for compiled code; set NUMBA_CACHE_DIR to one"
            ) from error
        except ImportError as error:
            raise BackendMissingError(
                f"--pipeline ffcv needs numba ({error}), which comes with FFCV: {INSTALL}"
            ) from error
        try:
            library = ctypes.CDLL(module.origin)
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
            raise MemoryError("libjpeg-turbo cannot allocate a decompressor")
        self.encoded = self.pixels = np.empty(0, dtype=np.uint8)

    def reserve(self, encoded_bytes: int, pixel_bytes: int) -> None:
        """Ensures the scratch memory is large enough. Unwritten memory costs nothing, so it grows by extra."""
        if len(self.encoded) < encoded_bytes:
            self.encoded = np.empty(2 * encoded_bytes, dtype=np.uint8)
        if len(self.pixels) < pixel_bytes:
            self.pixels = np.empty(2 * pixel_bytes, dtype=np.uint8)

    def close(self) -> None:
        self._end(self.handle)
        self.handle = None
