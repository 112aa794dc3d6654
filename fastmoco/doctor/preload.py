"""What the server of the check processes imports once; what cannot be imported is a finding of its check."""

import importlib
from contextlib import suppress

for name in ("torch", "torchvision", "numpy", "fastmoco.step.train_step", "pipelines.backends.two_view"):
    with suppress(Exception):
        importlib.import_module(name)
