"""The commands that go on from a run: continue, evaluate, export and use it."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from fastmoco.registry import OWN_PREFIX, TIMM_PREFIX
from fastmoco.report_page.run_files import RunFiles


class Command(NamedTuple):
    """What it does, the text to copy, and its language."""

    title: str
    text: str
    language: str = "shell"


def commands(run: RunFiles) -> list[Command]:
    """Commands with the absolute path of the run, quoted for a POSIX shell."""
    folder = str(run.folder)
    if str(run.config.model.arch).startswith(OWN_PREFIX):
        return [_in_python(run, folder), Command("Write this page again", _shell("report", folder))]
    found = [_continued(run, folder)]
    if run.has_checkpoint() or run.picture("backbone.safetensors"):
        found.append(Command("Evaluate the features", _shell("eval", folder)))
        found += [Command(f"Export to {target}", _shell("export", folder, "--to", target)) for target in _targets(run)]
        load = f"from fastmoco import load_backbone\n\nbackbone, preprocess = load_backbone({folder!a})"
        found.append(Command("Use it in Python", load, "Python"))
    repeated = f"{folder}-again"
    found.append(Command("Repeat it", _shell("train", "--config", f"{folder}/config.json", "--out", repeated)))
    found.append(Command("Write this page again", _shell("report", folder)))
    return found


def _in_python(run: RunFiles, folder: str) -> Command:
    """Those of a run of a module of the user's own, which only Python can give."""
    name = str(run.config.model.arch).removeprefix(OWN_PREFIX)
    lines = [
        "from fastmoco import Run, evaluate, export, train",
        "",
        f"net = {name}(...)  # the module that was given to train(model=...)",
        f"run = Run({folder!a}, model=net)",
    ]
    if not run.has_checkpoint():
        again = f"train(run.config, model=net, out={folder!a}, overwrite=True)"
        return Command("Start again, since there is no checkpoint", "\n".join([*lines, again]), "Python")
    epochs = f", epochs={2 * run.config.optim.epochs}" if run.state == "done" and run.config.optim.epochs else ""
    lines += [
        f"run = train(model=net, resume=run{epochs})",
        "metrics = evaluate(run)",
        'file = export(run, to="safetensors")',
        "backbone, preprocess = run.backbone()",
    ]
    return Command("Continue, evaluate, export and use it", "\n".join(lines), "Python")


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
    if run.config.data.channels != 3 or str(model.arch).startswith(TIMM_PREFIX):
        return ["timm", "safetensors"]
    has_detectron2 = model.arch in ("resnet50", "resnet101") and model.stem == "imagenet"
    return ["torchvision", "timm", *(["detectron2"] if has_detectron2 else []), "safetensors"]


def _shell(*words: str) -> str:
    return shlex.join(["fastmoco", *words])
