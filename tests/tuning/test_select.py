"""The preferred way that is right is taken, the fastest if asked for, and what is left out is said in one line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.tuning import cache, candidates, select
from fastmoco.tuning.candidates import Candidate
from fastmoco.tuning.select import Selection, Selector
from pipelines.views import Views
from tests.step.test_cuda_graph import Recorder
from tests.tuning.tiny import CPU, FAULTS, IMAGES, tiny_config, tiny_views

ALL = frozenset({"amp", "kernels", "compile", "cuda_graph", "stem_format", "prefetch", "cpu_threads"})
LADDER = [
    Candidate("bf16", "triton"),
    Candidate("bf16", "torch", "default"),
    Candidate("bf16", "torch"),
    Candidate("fp32", "torch"),
]


def batches(candidate: Candidate) -> Iterator[Views]:
    raise AssertionError("a batch was loaded")
    yield


@pytest.fixture
def gpu_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of preference that a GPU has, and a graph that needs none."""
    monkeypatch.setattr(select, "without_graph", lambda config, auto, device: iter(LADDER))


def chosen(auto: frozenset[str] = ALL, graph: RuntimeError | None = None, **options) -> Selection:
    config = tiny_config(amp="bf16", **options)
    config = Candidate("bf16", "triton", cuda_graph="on").apply(config)

    def capture(step, views):
        return GraphedStep(step, views, Recorder(graph))

    return Selector(config, auto, tiny_views(), 1000, IMAGES, World(CPU), batches, graph=capture).run()


def test_the_preferred_way_is_taken_if_it_is_right(implementation, gpu_ladder) -> None:
    selection = chosen()
    assert Candidate.of(selection.config) == Candidate("bf16", "triton", cuda_graph="on")
    assert selection.notes == []
    assert selection.checked.startswith("first step compared with plain PyTorch: loss ")


@pytest.mark.parametrize("fault", [FAULTS["gradient"], RuntimeError("no kernel image"), torch.OutOfMemoryError("no")])
def test_the_next_one_is_taken_if_it_is_not(implementation, gpu_ladder, fault) -> None:
    implementation["triton"] = fault
    selection = chosen()
    assert Candidate.of(selection.config) == Candidate("bf16", "torch", "default", cuda_graph="on")
    (note,) = selection.notes
    assert note.startswith("left out bf16, triton kernels: ")
    assert "\n" not in note


def test_everything_but_plain_pytorch_may_fail(implementation, gpu_ladder) -> None:
    implementation |= {"triton": FAULTS["key"], "default": FAULTS["loss"]}
    implementation["bf16"] = lambda step: step.model.query.head.register_forward_hook(lambda m, i, output: -output)
    selection = chosen()
    assert Candidate.of(selection.config) == Candidate("fp32", cuda_graph="on")
    assert [note.partition(":")[0] for note in selection.notes] == [
        "left out bf16, triton kernels",
        "left out bf16, torch kernels, compile default",
        "left out bf16, torch kernels",
    ]


def test_a_step_that_cannot_be_captured_runs_without_a_graph(implementation, gpu_ladder) -> None:
    selection = chosen(graph=RuntimeError("operation not permitted when stream is capturing"))
    assert Candidate.of(selection.config) == Candidate("bf16", "triton")
    (note,) = selection.notes
    assert "left out CUDA graph: " in note
    assert "not permitted when stream is capturing" in note


def test_what_was_given_by_name_is_an_error_if_it_fails(implementation, monkeypatch) -> None:
    monkeypatch.setattr(select, "without_graph", lambda config, auto, device: iter(LADDER[:1]))
    implementation["triton"] = FAULTS["gradient"]
    with pytest.raises(ConfigError, match=r"in float32, .*leave out --amp, --kernels"):
        chosen(auto=frozenset({"cuda_graph"}))
    del implementation["triton"]
    with pytest.raises(ConfigError, match="not permitted"):
        chosen(auto=ALL - {"cuda_graph"}, graph=RuntimeError("not permitted"))


def test_strict_allows_no_failure(implementation, gpu_ladder) -> None:
    implementation["triton"] = FAULTS["queue"]
    with pytest.raises(ConfigError, match="--check strict: bf16, triton kernels: in float32, queue"):
        chosen(check="strict")


def test_a_run_that_asks_for_nothing_draws_no_batch() -> None:
    def draws(dtype: torch.dtype, triton: bool | None, prefetch: bool):
        raise AssertionError("a batch was drawn")

    for options in ({"amp": "fp32"}, {"amp": "bf16", "check": "off"}):
        selection = select.select(tiny_config(**options), ALL, draws, 10, IMAGES, World(CPU))
        assert selection.checked == ""


# ---- tuning ----


@pytest.fixture
def milliseconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Stands for measured times: by the first word that a candidate's text contains, else 10."""
    times: dict[str, float] = {}

    def times_of(self: Selector, found: list[Candidate], loading: bool = False) -> list[float]:
        return [next((ms for word, ms in times.items() if word in str(c)), 10.0) / 1e3 for c in found]

    monkeypatch.setattr(Selector, "_time", times_of)
    return times


def tuned(path: Path, **options) -> Selection:
    config = tiny_config(tune="now", **options)
    return Selector(config, ALL, tiny_views(), 1000, IMAGES, World(CPU), batches, path, tunes=True).run()


def test_the_fastest_is_taken_and_remembered(implementation, milliseconds, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(candidates, "_thread_counts", lambda: [2, 1])
    milliseconds |= {"1 thread": 6.0, "2 threads": 11.0, "contiguous": 8.0}
    path = tmp_path / "new" / "tuning.json"
    selection = tuned(path)
    assert Candidate.of(selection.config) == Candidate("fp32", stem_format="contiguous", cpu_threads=1)
    assert selection.config.run.stem_format == "contiguous", "the run keeps it in its configuration"
    winners = [name for name, _, is_chosen in selection.table if is_chosen]
    assert winners == ["fp32, torch kernels, contiguous stem, 1 thread"]
    key = cache.key(tiny_config(tune="now"), ALL, CPU, 1)
    assert cache.load(path, key) == Candidate.of(selection.config)


def test_a_faster_one_that_is_wrong_is_left_out(implementation, milliseconds, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(candidates, "_thread_counts", lambda: [1])
    milliseconds["contiguous"] = 1.0
    implementation["contiguous"] = FAULTS["gradient"]
    selection = tuned(tmp_path / "tuning.json")
    assert selection.config.run.stem_format == "channels-last"
    assert any(note.startswith("left out fp32, torch kernels, contiguous stem: gradient") for note in selection.notes)


def test_a_gain_within_the_noise_changes_nothing(implementation, milliseconds, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(candidates, "_thread_counts", lambda: [1])
    milliseconds |= {"contiguous": 9.9, "1 thread": 9.9}
    assert Candidate.of(tuned(tmp_path / "tuning.json").config) == Candidate("fp32")


def test_prefetching_is_timed_with_the_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With views that take long where they are prefetched, as on a device that is shared."""
    loaded = {"on": 0, "off": 0}

    def load(candidate: Candidate) -> Iterator[Views]:
        for _ in range(3):  # fewer than are timed: the images begin anew
            loaded[candidate.prefetch] += 1
            time.sleep(0.5 * (candidate.prefetch == "on"))
            yield tiny_views()

    config = Candidate("fp32", prefetch="on").apply(tiny_config(tune="now", check="off"))
    off = Candidate("fp32")
    monkeypatch.setattr(select, "variations", lambda *_, **__: [[off]])
    path = tmp_path / "tuning.json"
    selection = Selector(config, ALL, tiny_views(), 1000, IMAGES, World(CPU), load, path, tunes=True).run()
    assert Candidate.of(selection.config) == off
    assert min(loaded.values()) > 3
    names = [(name, is_chosen) for name, _, is_chosen in selection.table]
    assert names == [
        ("fp32, torch kernels, prefetch", False),
        ("fp32, torch kernels, prefetch, with loading", False),
        ("fp32, torch kernels, with loading", True),
    ]
    milliseconds = [ms for _, ms, _ in selection.table]
    assert milliseconds[1] > 500 > milliseconds[2]


def test_short_runs_are_not_tuned_and_remembered_choices_are_used(implementation, milliseconds, tmp_path) -> None:
    """As --tune auto does on a GPU."""
    path = tmp_path / "tuning.json"
    config = tiny_config()
    short = Selector(config, ALL, tiny_views(), 1000, IMAGES, World(CPU), batches, path, tunes=True).run()
    assert short.table == []
    assert not path.exists()
    cache.store(path, cache.key(config, ALL, CPU, 1), Candidate("fp32", stem_format="contiguous"), {})
    found = Selector(config, ALL, tiny_views(), 1000, IMAGES, World(CPU), batches, path, tunes=True).run()
    assert found.config.run.stem_format == "contiguous"
    assert found.table == []


def test_a_cache_that_cannot_be_written_is_said(implementation, milliseconds, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(candidates, "_thread_counts", lambda: [1])
    (tmp_path / "file").write_text("")
    selection = tuned(tmp_path / "file" / "tuning.json")
    assert any(note.startswith("the choice is not remembered: ") for note in selection.notes)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0}', '{"format": 1, "entries": []}', '{"format": 1}'])
def test_a_damaged_cache_is_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    assert cache.load(path, "key") is None
    cache.store(path, "key", Candidate("fp32"), {})
    assert cache.load(path, "key") == Candidate("fp32")
    entries = json.loads(path.read_text())["entries"]
    entries["key"]["choice"] = {"unknown": 1}
    path.write_text(json.dumps({"format": 1, "entries": entries}))
    assert cache.load(path, "key") is None


def test_the_key_depends_on_shapes_and_on_what_is_free() -> None:
    config = tiny_config()
    keys = {
        cache.key(config, ALL, CPU, 1),
        cache.key(config, ALL, CPU, 2),
        cache.key(config, ALL - {"amp"}, CPU, 1),
        cache.key(tiny_config(batch_size=16), ALL, CPU, 1),
        cache.key(tiny_config(crop_size=24), ALL, CPU, 1),
        cache.key(tiny_config(workers=7), ALL, CPU, 1),
    }
    assert len(keys) == 6
    assert cache.key(tiny_config(seed=7, lr=0.5), ALL, CPU, 1) == cache.key(config, ALL, CPU, 1)
