"""A run of two ranks that diverges in its last epoch: both end, with one verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmoco.errors import ExitCode
from fastmoco.step.schedules import Rates
from tests.distributed.test_distributed_train import ending, stay_joined
from tests.ranks import results, start


def explodes(folder: Path) -> str:
    stay_joined()
    with pytest.MonkeyPatch.context() as patch:
        original = Rates.lr
        patch.setattr(Rates, "lr", lambda self, step: 1e25 if step >= 4 else original(self, step))
        return ending(folder / "run", "--checkpoint-every", "4", "--log-every", "50", "--knn-every", "0")


@pytest.mark.slow
def test_both_ranks_end_and_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    endings = sorted(results(start(2, explodes, tmp_path)))
    assert endings[1] == f"already reported {ExitCode.DIVERGED}"
    assert endings[0].startswith("DivergedError: the loss, a gradient or a batch norm statistic was not finite for 3")
    assert endings[0].endswith("step-000000004.safetensors")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", ExitCode.DIVERGED)
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
