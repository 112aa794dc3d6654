"""The ranks that train together: who they are, and every word they exchange. Nothing else imports torch.distributed.

R ranks · N rows of a rank · a machine is what one torchrun agent looks after
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
_PATIENCE = 0.8  # of the time-out is spent on a message: what is left, on ending in good order before the watchdog
_NCCL_AFTER_S = 60.0  # NCCL's watchdog aborts the process: it is for what even ours has missed


class Pending:
    """A collective under way. `wait()` gives its result; on a GPU it is the stream that waits, not the host."""

    def __init__(self, result: Tensor, work: dist.Work | None = None, world: World | None = None) -> None:
        self._result, self._work, self._world = result, work, world

    def wait(self) -> Tensor:
        """Raises RankLostError where another rank never came, or is gone."""
        if self._work is not None and self._world is not None:
            with self._world.rank_errors():
                self._work.wait()
            self._work = None
        return self._result


class World:
    """Rank, size and device of this process, and its words with the others.

    rank, size  which of how many processes this is; `rank_info` says it for this machine too
    device      where this rank's tensors lie
    timeout_s   the longest that any rank waits for another

    Where size is 1, every collective is an identity, and nothing of torch.distributed is started. Collectives must be
    called by all ranks in the same order. Tensors travel on the device (NCCL, or gloo on a CPU), votes and outcomes on
    the host through gloo and the store of the rendezvous, so that no one has to read the device for them.
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
        self._asked = 0
        self._parts: dict[int, World] = {}

    @staticmethod
    def join(device: str = "auto", timeout_s: float = 600.0) -> World:
        """The world that torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …) describes, or this
        process alone without one. With CUDA, a rank takes the device of its local rank.

        Raises ConfigError for a broken environment, DeviceError without a device for this rank, RankLostError where the
        others do not come in time.
        """
        rank_info = RankInfo.from_environment()
        if rank_info.size == 1:
            return World(pick_device(device), timeout_s=timeout_s)
        own = device_of_rank(device, rank_info.local_rank, rank_info.local_size)
        on_gpu, limit = own.type == "cuda", timedelta(seconds=_PATIENCE * timeout_s)
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=dist.PrefixStore("collectives", store),
                rank=rank_info.rank,
                world_size=rank_info.size,
                timeout=limit + timedelta(seconds=_NCCL_AFTER_S) if on_gpu else limit,
                device_id=own if on_gpu else None,
            )
            host = dist.new_group(backend="gloo", timeout=limit)
            assert isinstance(host, dist.ProcessGroup)
        except RuntimeError as error:
            raise RankLostError(
                f"the {rank_info.size} ranks failed to rendezvous ({_first_line(error)}): check MASTER_ADDR and "
                f"MASTER_PORT, or raise --dist-timeout above {timeout_s:g} s"
            ) from error
        outcomes = Outcomes(dist.PrefixStore("fastmoco", store))
        return World(own, rank_info=rank_info, timeout_s=timeout_s, outcomes=outcomes, host=host)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes, draws and speaks for all."""
        return self.rank == 0

    def close(self) -> None:
        """Takes leave of the others, once all have come to their end; one of them may keep the store."""
        if self.size > 1:
            with suppress(RuntimeError):
                dist.barrier(group=self._host)
                dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after a failure, ending the process is the quicker way
            self.close()
        elif self._outcomes is not None and self.is_main:
            self._outcomes.linger(self.size)

    # ---- tensors ----

    def all_reduce(self, tensor: Tensor) -> Pending:
        """Replaces a tensor, contiguous and of one shape on all ranks, by its sum: the same bits everywhere."""
        if self.size == 1:
            return Pending(tensor)
        with self.rank_errors():
            return Pending(tensor, dist.all_reduce(tensor, group=self._group, async_op=True), self)

    def all_gather(self, tensor: Tensor) -> Pending:
        """(N, …) of every rank → (R·N, …), in rank order. Not differentiable: see `all_gather_with_grad`."""
        if self.size == 1:
            return Pending(tensor)
        tensor = tensor.contiguous()
        rows = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        with self.rank_errors():
            return Pending(rows, dist.all_gather_into_tensor(rows, tensor, group=self._group, async_op=True), self)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites a tensor by rank 0's."""
        if self.size > 1:
            whole = tensor.contiguous()
            with self.rank_errors():
                dist.broadcast(whole, 0, group=self._group)
            tensor.copy_(whole)

    def share(self, rows: Tensor) -> Tensor:
        """This rank's N of (R·N, …) rows."""
        count, rest = divmod(len(rows), self.size)
        assert rest == 0, f"{len(rows)} rows do not divide over {self.size} ranks"
        return rows[self.rank * count : (self.rank + 1) * count]

    def subgroup(self, parts: int) -> World:
        """This rank's world where all ranks are divided into so many runs of consecutive ranks. All must ask."""
        ranks, rest = divmod(self.size, parts)
        assert rest == 0, f"{self.size} ranks do not divide into {parts} parts"
        if parts == 1:
            return self
        if parts not in self._parts:
            group = None
            if ranks > 1:
                with self.rank_errors():
                    group, _ = dist.new_subgroups(ranks, timeout=timedelta(seconds=_PATIENCE * self.timeout_s))
            self._parts[parts] = World(
                self.device,
                rank_info=RankInfo(self.rank % ranks, ranks),
                timeout_s=self.timeout_s,
                outcomes=self._outcomes,
                group=group,
            )
        return self._parts[parts]

    # ---- words ----

    def on_main(self, function: Callable[[], T]) -> T:
        """Rank 0 calls the function; its result, which must survive JSON, or its error is that of every rank."""
        return self._follow(f"main/{self._next()}", self.is_main, function)

    def first_on_each_machine(self, function: Callable[[], T]) -> T:
        """Every rank calls the function, on each machine one rank before the others: what it leaves on the disk, a
        download or an index, they find there. Where it raises, so do they, without trying."""
        key, result = f"machine{self.rank_info.machine}/{self._next()}", []

        def call() -> None:
            result.append(function())

        self._follow(key, self.rank_info.local_rank == 0, call)
        return result[0] if result else function()

    def report_failure(self, error: BaseException) -> bool:
        """Leaves word of why this rank ends, before the others find it gone. Whether it is the first to."""
        return self._outcomes is None or self._outcomes.report_failure(error)

    def first_failure(self) -> Exception | None:
        """The error that the first rank to end has left word of."""
        return None if self._outcomes is None else self._outcomes.first_failure()

    def check_same(self, digests: Mapping[str, bytes]) -> None:
        """Raises DivergedError, naming what differs, where a rank has other digests (of one length) than rank 0."""
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
                    f"{name} of rank {ranks} is not that of rank 0, and all ranks must hold the same: a device or a "
                    "link makes mistakes, or a library is not the same everywhere; resume with --resume"
                )

    def _follow(self, key: str, leads: bool, function: Callable[[], T]) -> T:
        if self._outcomes is None:
            return function()
        with self.rank_errors():
            return self._outcomes.lead(key, function) if leads else self._outcomes.follow(key)

    def _next(self) -> int:
        self._asked += 1
        return self._asked

    @contextmanager
    def rank_errors(self) -> Iterator[None]:
        """Inside, what torch says of a rank that is gone or late becomes RankLostError, or what that rank has noted."""
        try:
            yield
        except RuntimeError as error:
            if exit_code(error) is not None:  # it says already what it is
                raise
            raise self.first_failure() or RankLostError(
                f"another rank is gone, or silent for {self.timeout_s:g} s ({_first_line(error)}): resume with --resume"
            ) from error


class StopVote:
    """Whether a rank has raised its hand, agreed by all: `vote(hand)`, called by every rank as often as by the others.

    Nobody waits for the answer: with several ranks it is that of the call before, whose messages had a step to travel.
    A rank that does not vote within the time-out is lost, which the others so learn without reading their device.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: Pending | None = None

    def __call__(self, hand: bool) -> bool:
        world = self._world
        if world.size == 1:
            return hand
        before = self._pending
        hands = torch.tensor([int(hand)], dtype=torch.int32)
        with world.rank_errors():
            self._pending = Pending(hands, dist.all_reduce(hands, group=world._host, async_op=True), world)
        return before is not None and bool(before.wait().item())

    def close(self) -> None:
        """Waits for the last answer, which all ranks have asked for."""
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
    """`World.gather` with a gradient: that of a row is the sum of what all ranks' losses ask of it."""
    return tensor if world.size == 1 else _AllGather.apply(tensor, world)  # pyright: ignore[reportReturnType]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
