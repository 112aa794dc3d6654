"""Peak memory of a training step at the recipes' sizes, ours and plain PyTorch's, in bytes. No arguments."""

from __future__ import annotations

import gc
import json

import torch

from benchmarks.measure.variants import CONFIGS, VARIANTS, Variant, synthetic_views
from tests.standin import operators

# fp32 in NCHW; 16 bits in channels-last; ours.
NAMES = ("plain", "amp", "triton")
WARM_UP = 2


def peak_bytes(variant: Variant, config: str) -> int:
    """Parameters, state, one batch and all that a step allocates; libraries' workspaces are missing."""
    device, task = torch.device("cuda", 0), CONFIGS[config]
    step = variant.build(task, device, torch.bfloat16, "off")
    dtype = torch.bfloat16 if variant.low_precision else torch.float32
    views = synthetic_views(task, device, dtype, channels_last=variant.channels_last)[0]
    for _ in range(WARM_UP):
        step(views)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step(views)
    peak = torch.cuda.max_memory_allocated()
    del step, views
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= 8192, "more than the counters that kernels keep"
    return peak


def main() -> None:
    operators.install()
    variants = {variant.name: variant for variant in VARIANTS}
    print(json.dumps({config: {name: peak_bytes(variants[name], config) for name in NAMES} for config in CONFIGS}))


if __name__ == "__main__":
    main()
