"""Small results in the format of the benchmark scripts, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "cpu": "Test CPU",
    "cores": 2,
    "memory_gib": 8.0,
    "platform": "Linux-6.18.44-name-of-a-machine-x86_64-with-glibc2.36",
    "device": "cpu",
    "gpu": None,
    "driver": None,
    "versions": {"torch": "2.15.0", "cuda": None, "cudnn": None, "python": "3.11.7"},
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "command": "benchmarks/script.py --data /somewhere/data/cifar10 --out /elsewhere/out",
    "date": "2026-11-21T12:00:00+00:00",
}
TASK = {
    "arch": "resnet18",
    "stem": "cifar",
    "side": 8,
    "batch_size": 8,
    "queue": 64,
    "bn_splits": 2,
    "dim": 16,
    "temperature": 0.1,
    "lr": 0.03,
    "sgd_momentum": 0.9,
    "weight_decay": 5e-4,
    "ema_momentum": 0.99,
}
DATA = {"images": 100, "stored_bytes": 1000, "description": "cifar10/train: 100 images of 32×32, 10 classes"}


def summary(median: float) -> dict[str, Any]:
    return {"median": median, "lower_quartile": 0.9 * median, "upper_quartile": 1.1 * median, "values": [median]}


def _result(benchmark: str, **more: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "environment": dict(ENVIRONMENT), "settings": {"quick": False}, **more}


def pipelines(rate: float = 500.0) -> dict[str, Any]:
    def case(images_per_s: float) -> dict[str, Any]:
        ratio = summary(images_per_s / 100.0)
        numbers = {"images_per_s": images_per_s, "cpu_ms_per_image": 0.2, "host_bytes": 3e6}
        return {key: summary(value) for key, value in numbers.items()} | {"ratio_to_control": ratio}

    result = _result("pipelines", data=DATA, left_out={"dali": "nvidia.dali is not installed: uv sync --extra dali"})
    result["settings"] |= {"colour": True, "crop_size": 32, "batch_size": 8, "data": "/somewhere/data/cifar10"}
    return result | {"cases": {"resident": case(rate), "dataloader": case(100.0)}}


def step(rate: float = 60.0) -> dict[str, Any]:
    def variant(images_per_s: float, number_format: str) -> dict[str, Any]:
        numbers = {"images_per_s": images_per_s, "ms": 8e3 / images_per_s, "ratio_to_plain": images_per_s / 20.0}
        summaries: dict[str, Any] = {key: summary(value) for key, value in numbers.items()}
        memory = {"peak_resident_bytes": 5e6}
        summaries |= {"format": number_format}
        return summaries | {"tflop_per_s": 0.1, "share_of_roofline": 0.5, "warm_up_s": 1.0, "memory": memory}

    result = _result("step-cifar-cpu", task=TASK, dtype="torch.bfloat16", left_out={})
    return result | {"rungs": {"plain": variant(20.0, "fp32"), "trainstep": variant(rate, "bf16")}}


def train(share: float = 0.5) -> dict[str, Any]:
    def case(images_per_s: float, bottleneck: str) -> dict[str, Any]:
        numbers = {"images_per_s": images_per_s, "data_wait_percent": 40.0, "cpu_ms_per_image": 9.0, "host_bytes": 4e6}
        summaries: dict[str, Any] = {key: summary(value) for key, value in numbers.items()}
        ratios = {"share_of_step_only": summary(share), "ratio_to_plain": summary(images_per_s / 15.0)}
        return summaries | ratios | {"bottleneck": bottleneck}

    alone = {"ours": {"images_per_s": summary(60.0)}, "plain": {"images_per_s": summary(20.0)}}
    cases = {"resident": case(60.0 * share, "step" if share >= 0.95 else "input"), "plain": case(15.0, "input")}
    ours = {"amp": "bf16", "kernels": "torch", "compile": "off", "cuda_graph": "off"}
    result = _result("train-cifar", task=TASK | {"width": 1.0}, step=ours, data=DATA, left_out={})
    return result | {"step_only": alone, "cases": cases}


def peers() -> dict[str, Any]:
    def row(images_per_s: float) -> dict[str, Any]:
        numbers = {"images_per_s": images_per_s, "data_wait_percent": 1.0, "cpu_ms_per_image": 9.0, "host_bytes": 4e6}
        return {key: summary(value) for key, value in numbers.items()} | {"terms": "bf16", "open_s": 1.0}

    rows = {"fastmoco-resident": row(50.0), "lightly": row(10.0), "authors-best": row(20.0)}
    ratios = {"fastmoco-resident": {"lightly": summary(5.0), "authors-best": summary(2.5)}}
    return _result("peers-cifar", task=TASK, data=DATA, left_out={}, rows=rows, ratios=ratios)


def accuracy(seed: int, minutes: float | None, final: float) -> dict[str, Any]:
    config = {"width": 1.0, "limit": None, "epochs": 200, "batch_size": 512}
    run = {
        "state": "done",
        "evaluations": [[5, 0.5, 40.0], [200, 9.0, final]],
        "best_percent": final,
        "final_percent": final,
        "training_minutes": 9.0,
        "wall_minutes": 10.0,
        "images_per_s": 1000.0,
        "config": config,
    }
    epoch = None if minutes is None else 150
    target = {"percent": 80.0, "training_minutes": {str(seed): minutes}, "epochs": {str(seed): epoch}}
    return _result("accuracy", recipes={"cifar10-demo": {"targets": [target], "runs": {str(seed): run}}})


def scaling() -> dict[str, Any]:
    row = {"case": "ours", "point": 8, "step_ms": summary(9.0), "images_per_s": summary(60.0)}
    row |= {"peak_resident_bytes": summary(7e6), "ratio_to_first": summary(1.0)}
    axis = {"label": "images per step", "grows": "step_ms", "rows": [row], "left_out": {}}
    return _result("scaling-cifar", task=TASK, dtype="torch.bfloat16", axes={"batch": axis})


def write(folder: Path, **results: dict[str, Any]) -> Path:
    """Write each result to FOLDER/NAME/NAME.json."""
    for name, result in results.items():
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.json").write_text(json.dumps(result))
    return folder
