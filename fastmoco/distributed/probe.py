"""Tries a communication library: an all-reduce between new processes of this machine, its result and its rate.

R ranks
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(seconds=40)
_CALLS = 10


def is_available(backend: str) -> bool:
    """Whether torch was built with the library, `gloo` or `nccl`."""
    return dist.is_available() and dist.is_backend_available(backend)


def try_all_reduce(backend: str, ranks: int, size_bytes: int) -> float:
    """Seconds of an all-reduce of `size_bytes` over all ranks; with NCCL, rank r has GPU r.

    The processes are forked: call it in one that has used neither CUDA nor torch's threads. Raises RuntimeError with
    the reason if a rank fails or the sum is wrong.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="fastmoco-") as folder:
        store = f"file://{Path(folder) / 'store'}"
        receivers, processes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, backend, store, rank, ranks, size_bytes)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            sender.close()
            receivers.append(receiver)
        try:
            results = [_receive(rank, receiver) for rank, receiver in enumerate(receivers)]
        finally:
            for process in processes:
                process.kill()
                process.join()
    for result in results:
        if isinstance(result, str):
            raise RuntimeError(result)
    return max(result for result in results if isinstance(result, float))


def _receive(rank: int, receiver: Connection) -> float | str:
    """Seconds, or the reason why there are none."""
    try:
        return receiver.recv() if receiver.poll(2 * _TIMEOUT.total_seconds()) else f"rank {rank} hangs"
    except EOFError:
        return f"rank {rank} exited without a result"


def _rank(sender: Connection, backend: str, store: str, rank: int, ranks: int, size_bytes: int) -> None:
    try:
        sender.send(_all_reduce_s(backend, store, rank, ranks, size_bytes))
    except Exception as error:
        sender.send(f"rank {rank}: {str(error).strip().partition(chr(10))[0]}")


def _all_reduce_s(backend: str, store: str, rank: int, ranks: int, size_bytes: int) -> float:
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)
    tensor = torch.full((size_bytes // 4,), float(rank + 1), device=device)
    dist.all_reduce(tensor)
    expected = ranks * (ranks + 1) / 2
    if not bool((tensor == expected).all()):
        raise RuntimeError(f"the sum of {ranks} ranks is {tensor[0].item():g}, expected {expected:g}")
    tensor.zero_()
    began = time.perf_counter()
    for _ in range(_CALLS):
        dist.all_reduce(tensor)
    tensor[0].item()  # waits for the device
    seconds = (time.perf_counter() - began) / _CALLS
    dist.destroy_process_group()
    return seconds
