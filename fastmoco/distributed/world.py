"""Ranks and their communication. Only this package imports torch.distributed.

R ranks · N rows per rank · a machine is one torchrun agent
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.device import device_of_rank, pick_device
from fastmoco.distributed.launch import SINGLE_PROCESS, RankInfo
from fastmoco.distributed.outcomes import Outcomes
from fastmoco.errors import DivergedError, RankLostError, exit_code

T = TypeVar("T")
_COLLECTIVE_SHARE = 0.8  # of the timeout for one collective; the rest is for a clean exit before the watchdog's
_NCCL_MARGIN_S = 60.0  # NCCL's own watchdog aborts the process: it is the last resort


class AsyncResult:
    """Result of an asynchronous collective. On a GPU, `wait()` blocks the stream, not the host."""

    def __init__(self, result: Tensor, work: dist.Work | None = None, world: World | None = None) -> None:
        self._result, self._work, self._world = result, work, world

    def wait(self) -> Tensor:
        """Return the result. Raises RankLostError if another rank is missing or has exited."""
        if self._work is not None and self._world is not None:
            with self._world.rank_errors():
                self._work.wait()
            self._work = None
        return self._result


class World:
    """Rank, world size and device of this process, and its collectives.

    rank, size  of this process; `rank_info` also has those within the machine
    device      of this rank's tensors
    timeout_s   the longest that a rank waits for another

    With size 1, every collective is the identity and torch.distributed is not initialised. All ranks must call the
    collectives in the same order. Tensors are sent from the device (NCCL, or gloo on a CPU); votes and outcomes from
    the host through gloo and the rendezvous store, so that they need no synchronisation with the device.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rank_info: RankInfo = SINGLE_PROCESS,
        timeout_s: float = 600.0,
        outcomes: Outcomes | None = None,
        group: dist.ProcessGroup | None = None,
        host: dist.ProcessGroup | None = None,
    ) -> None:
        self.device, self.rank_info, self.timeout_s = device, rank_info, timeout_s
        self.rank, self.size = rank_info.rank, rank_info.size
        self._outcomes, self._group, self._host = outcomes, group, host
        self._calls = 0
        self._subgroups: dict[int, World] = {}

    @staticmethod
    def join(device: str = "auto", timeout_s: float = 600.0) -> World:
        """Initialise from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …); without it, a world of
        size 1. With CUDA, the device index is the local rank.

        Raises ConfigError on invalid variables, DeviceError without a device for this rank, RankLostError if other
        ranks do not join in time.
        """
        rank_info = RankInfo.from_environment()
        if rank_info.size == 1:
            return World(pick_device(device), timeout_s=timeout_s)
        own_device = device_of_rank(device, rank_info.local_rank, rank_info.local_size)
        on_gpu, limit = own_device.type == "cuda", timedelta(seconds=_COLLECTIVE_SHARE * timeout_s)
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=dist.PrefixStore("collectives", store),
                rank=rank_info.rank,
                world_size=rank_info.size,
                timeout=limit + timedelta(seconds=_NCCL_MARGIN_S) if on_gpu else limit,
                device_id=own_device if on_gpu else None,
            )
            host = dist.new_group(backend="gloo", timeout=limit)
            assert isinstance(host, dist.ProcessGroup)
        except RuntimeError as error:
            raise RankLostError(
                f"rendezvous of {rank_info.size} ranks failed ({_first_line(error)}): check MASTER_ADDR and "
                f"MASTER_PORT, or raise --dist-timeout above {timeout_s:g} s"
            ) from error
        outcomes = Outcomes(dist.PrefixStore("fastmoco", store))
        return World(own_device, rank_info=rank_info, timeout_s=timeout_s, outcomes=outcomes, host=host)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def close(self) -> None:
        """Wait for all ranks, since one of them may host the store, and destroy the process group."""
        if self.size > 1:
            with suppress(RuntimeError):
                dist.barrier(group=self._host)
                dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after a failure, exiting is quicker
            self.close()
        elif self._outcomes is not None and self.is_main:
            self._outcomes.wait_for_failures(self.size)

    # ---- tensors ----

    def all_reduce(self, tensor: Tensor) -> AsyncResult:
        """Sum a contiguous tensor over all ranks, in place; bit-identical on all ranks."""
        if self.size == 1:
            return AsyncResult(tensor)
        with self.rank_errors():
            return AsyncResult(tensor, dist.all_reduce(tensor, group=self._group, async_op=True), self)

    def all_gather(self, tensor: Tensor) -> AsyncResult:
        """(N, …) per rank → (R·N, …) in rank order. Not differentiable: see `all_gather_with_grad`."""
        if self.size == 1:
            return AsyncResult(tensor)
        tensor = tensor.contiguous()
        rows = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        with self.rank_errors():
            return AsyncResult(rows, dist.all_gather_into_tensor(rows, tensor, group=self._group, async_op=True), self)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with that of rank 0."""
        if self.size > 1:
            buffer = tensor.contiguous()
            with self.rank_errors():
                dist.broadcast(buffer, 0, group=self._group)
            tensor.copy_(buffer)

    def share(self, rows: Tensor) -> Tensor:
        """This rank's N rows of (R·N, …)."""
        count, rest = divmod(len(rows), self.size)
        assert rest == 0, f"{len(rows)} rows are not divisible by {self.size} ranks"
        return rows[self.rank * count : (self.rank + 1) * count]

    def subgroup(self, count: int) -> World:
        """This rank's world after a split into `count` groups of consecutive ranks. All ranks must call it."""
        ranks, rest = divmod(self.size, count)
        assert rest == 0, f"{self.size} ranks are not divisible into {count} groups"
        if count == 1:
            return self
        if count not in self._subgroups:
            group = None
            if ranks > 1:
                with self.rank_errors():
                    limit = timedelta(seconds=_COLLECTIVE_SHARE * self.timeout_s)
                    group, _ = dist.new_subgroups(ranks, timeout=limit)
            self._subgroups[count] = World(
                self.device,
                rank_info=RankInfo(self.rank % ranks, ranks),
                timeout_s=self.timeout_s,
                outcomes=self._outcomes,
                group=group,
            )
        return self._subgroups[count]

    # ---- results and failures ----

    def on_main(self, function: Callable[[], T]) -> T:
        """Call the function on rank 0; every rank returns its result, which must survive JSON, or raises its error."""
        return self._call_once(f"main/{self._next_call()}", self.is_main, function)

    def local_main_first(self, function: Callable[[], T]) -> T:
        """Call the function on local rank 0 of each machine, then on its other ranks, which find the files it has
        written, such as a download or an index. If it raises, so do they, without calling it."""
        key, result = f"machine{self.rank_info.machine}/{self._next_call()}", []

        def call() -> None:
            result.append(function())

        self._call_once(key, self.rank_info.local_rank == 0, call)
        return result[0] if result else function()

    def report_failure(self, error: BaseException) -> bool:
        """Record why this rank exits, before the others notice. Returns whether it is the first to fail."""
        return self._outcomes is None or self._outcomes.report_failure(error)

    def first_failure(self) -> Exception | None:
        """The error of the first rank that failed, or None."""
        return None if self._outcomes is None else self._outcomes.first_failure()

    def check_same(self, digests: Mapping[str, bytes]) -> None:
        """Raise DivergedError, naming the entry, if digests (all of one length) differ from those of rank 0."""
        if self.size == 1 or not digests:
            return
        own = torch.tensor([list(digest) for digest in digests.values()], dtype=torch.uint8)
        all_ranks = torch.empty((self.size, *own.shape), dtype=torch.uint8)
        with self.rank_errors():
            dist.all_gather_into_tensor(all_ranks.flatten(0, 1), own, group=self._host)
        same = (all_ranks == all_ranks[0]).flatten(2).all(2)
        for row, name in enumerate(digests):
            if not same[:, row].all():
                ranks = ", ".join(map(str, (~same[:, row]).nonzero().flatten().tolist()))
                raise DivergedError(
                    f"{name} of rank {ranks} differs from that of rank 0: check for a faulty device or link, and for "
                    "different library versions; resume with --resume"
                )

    def _call_once(self, key: str, here: bool, function: Callable[[], T]) -> T:
        if self._outcomes is None:
            return function()
        with self.rank_errors():
            return self._outcomes.publish(key, function) if here else self._outcomes.wait(key)

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls

    @contextmanager
    def rank_errors(self) -> Iterator[None]:
        """Turn torch's errors about a lost or late rank into RankLostError, or into the failure that it reported."""
        try:
            yield
        except RuntimeError as error:
            if exit_code(error) is not None:  # already one of ours
                raise
            raise self.first_failure() or RankLostError(
                f"another rank exited or was unresponsive for {self.timeout_s:g} s ({_first_line(error)}): "
                "resume with --resume"
            ) from error


class StopVote:
    """Agreement of all ranks on whether to stop: true if any rank requests it. All ranks must call it equally often.

    It never blocks on the current call: with several ranks the result is that of the previous one, whose messages had
    a step's time to arrive. A rank that does not vote within the timeout is lost, which the others so notice without
    synchronising with their device.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: AsyncResult | None = None

    def __call__(self, requested: bool) -> bool:
        world = self._world
        if world.size == 1:
            return requested
        previous = self._pending
        votes = torch.tensor([int(requested)], dtype=torch.int32)
        with world.rank_errors():
            self._pending = AsyncResult(votes, dist.all_reduce(votes, group=world._host, async_op=True), world)
        return previous is not None and bool(previous.wait().item())

    def close(self) -> None:
        """Wait for the last vote, in which all ranks have taken part."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.all_gather(tensor).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.world.share(ctx.world.all_reduce(grads[0].clone(memory_format=torch.contiguous_format)).wait()), None


def all_gather_with_grad(tensor: Tensor, world: World) -> Tensor:
    """`World.all_gather` with a gradient: for each row, the sum of the gradients of all ranks' losses."""
    return tensor if world.size == 1 else _AllGather.apply(tensor, world)  # pyright: ignore[reportReturnType]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
