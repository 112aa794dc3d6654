"""The commands that go on from a run: continue, evaluate, export and use it."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from fastmoco.registry import EXPORT_TARGETS
from fastmoco.report_page.run_files import RunFiles


class Command(NamedTuple):
    """What it does, the text to copy, and its language."""

    title: str
    text: str
    language: str = "shell"


def commands(run: RunFiles) -> list[Command]:
    """Commands with the absolute path of the run, quoted for a POSIX shell."""
    folder = str(run.folder)
    found = [_continued(run, folder)]
    if run.has_checkpoint() or run.picture("backbone.safetensors"):
        found.append(Command("Evaluate the features", _shell("eval", folder)))
        found += [
            Command(f"Export to {target}", _shell("export", folder, "--to", target, "-o", _file_name(run, target)))
            for target in _targets(run)
        ]
        load = f"from fastmoco import load_backbone\n\nbackbone, preprocess = load_backbone({folder!a})"
        found.append(Command("Use it in Python", load, "Python"))
    repeated = f"{folder}-again"
    found.append(Command("Repeat it", _shell("train", "--config", f"{folder}/config.json", "--out", repeated)))
    found.append(Command("Write this page again", _shell("report", folder)))
    return found


def _continued(run: RunFiles, folder: str) -> Command:
    epochs = run.config.optim.epochs
    if not run.has_checkpoint():
        text = _shell("train", "--config", f"{folder}/config.json", "--out", folder, "--overwrite")
        return Command("Start again, since there is no checkpoint", text)
    if run.state == "done" and epochs:
        text = _shell("train", "--resume", folder, "--epochs", str(2 * epochs))
        return Command(f"Continue to {2 * epochs:,} epochs", text)
    return Command("Continue from the last checkpoint", _shell("train", "--resume", folder))


def _targets(run: RunFiles) -> list[str]:
    """Export targets for this backbone; other libraries build only the width that has a name, and colours."""
    model = run.config.model
    if model.width != 1:
        return ["safetensors"]
    if run.config.data.channels != 3 or str(model.arch).startswith("timm/"):
        return ["timm", "safetensors"]
    has_detectron2 = model.arch in ("resnet50", "resnet101") and model.stem == "imagenet"
    return ["torchvision", "timm", *(["detectron2"] if has_detectron2 else []), "safetensors"]


def _file_name(run: RunFiles, target: str) -> str:
    return f"{run.name}-{target}{EXPORT_TARGETS[target].suffixes[0]}"


def _shell(*words: str) -> str:
    return shlex.join(["fastmoco", *words])
