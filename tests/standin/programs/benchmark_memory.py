"""Memory that `benchmarks/step.py` reports of a step and of its CUDA graph, in bytes. No arguments."""

from __future__ import annotations

import json

import torch

from benchmarks.measure.variants import CONFIGS, VARIANTS, Runner, synthetic_views
from tests.standin import operators


def main() -> None:
    operators.install()
    device, task = torch.device("cuda", 0), CONFIGS["cifar"]
    views = synthetic_views(task, device, torch.bfloat16, channels_last=True)
    inputs = sum(t.nbytes for t in (views[0].query, views[0].key, views[0].key_order, views[0].index))
    del views
    report: dict[str, object] = {"inputs_bytes": inputs}
    for variant in VARIANTS:
        if variant.name in ("triton", "graph"):
            report[variant.name] = Runner(variant, task, device, torch.bfloat16, "off", seconds=0.001).memory
    print(json.dumps(report))


if __name__ == "__main__":
    main()
