"""Torch finds the stand-in, and the log tells what it is asked for. No arguments."""

from __future__ import annotations

import json

import torch

from tests.standin import operators, runtime


def refused(*, joins: bool, waits: bool) -> str:
    """The error of a capture in which a second stream is used, and joined or not, or the host waits; empty if none."""
    graph, stream, other = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.zeros(8, device="cuda")
    try:
        with torch.cuda.graph(graph, stream=stream):
            other.wait_stream(stream)
            with torch.cuda.stream(other):
                x.add_(1)
            if joins:
                stream.wait_stream(other)
            if waits:
                stream.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_stream(torch.cuda.default_stream())
    return ""


def progress() -> list[bool]:
    """Whether work counts as finished: at once, when the next step begins, and at the one after that."""
    runtime.set_lag(1)
    event = torch.cuda.Event()
    torch.zeros(8, device="cuda").add_(1)
    event.record()
    finished = [event.query()]
    for _ in range(2):
        runtime.step_begins()
        finished.append(event.query())
    runtime.set_lag(0)
    return finished


def main() -> None:
    operators.install()
    device = torch.device("cuda")
    with runtime.CallLog() as log:
        x = torch.zeros(8, 8, device=device)
        (x @ x + 1).sum()
        pinned = torch.zeros(4).pin_memory().to(device, non_blocking=True)
        torch.zeros(4).to(device, non_blocking=True)
        pinned.sum().item()
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "kernels": len(log.kernels()),
                "copies": runtime.texts(log.host_copies()),
                "waits": runtime.texts(log.host_waits()),
                "violations": runtime.violations(),
                "joined": refused(joins=True, waits=False),
                "not joined": refused(joins=False, waits=False),
                "waiting": refused(joins=True, waits=True),
                "progress": progress(),
            }
        )
    )


if __name__ == "__main__":
    main()
