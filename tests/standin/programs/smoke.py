"""Torch finds the stand-in, and the log tells what it is asked for. No arguments."""

from __future__ import annotations

import json

import torch

from tests.standin import operators, runtime


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
            }
        )
    )


if __name__ == "__main__":
    main()
