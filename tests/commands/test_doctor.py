"""`fastmoco doctor`: the report, its exit code, and that every part is tried."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastmoco.cli import main
from fastmoco.commands import doctor
from fastmoco.commands.doctor_options import DoctorOptions, parse_doctor
from fastmoco.doctor.findings import CHECKS, DEVICE, GROUPS, Check, Finding, Result, Status, Target
from fastmoco.errors import ConfigError, ExitCode
from pipelines.registry import load


def by_name(**findings: Finding) -> Any:
    """A `run` that returns these findings, by the name of the check with _ for spaces, and `ok` for all others."""

    def run(check: Check, target: Target) -> Result:
        finding = findings.get(check.name.replace(" ", "_"), Finding(text="fine"))
        return Result(check, finding, 0.125)

    return run


def report(capsys: pytest.CaptureFixture[str], run: Any, **options: Any) -> tuple[int, dict[str, Any]]:
    code = doctor.doctor_command(DoctorOptions(json=True, **options), run=run)
    return code, json.loads(capsys.readouterr().out)


def test_json_has_every_check_in_order(capsys) -> None:
    found = Finding(text="a device", figures={"device": "cuda:0", "visible": 2})
    use = Finding(text="all of it", figures={"amp": "bf16", "rate": float("nan")})
    code, out = report(capsys, by_name(device=found, training=use))
    assert code == out["exit_code"] == ExitCode.DONE
    assert out["ok"] is True
    assert out["device"] == "cuda:0"
    assert out["use"]["amp"] == "bf16"
    assert [(c["group"], c["name"]) for c in out["checks"]] == [(c.group, c.name) for c in CHECKS]
    for entry in out["checks"]:
        assert entry.keys() == {"group", "name", "status", "text", "advice", "figures", "seconds"}
        assert entry["status"] in {"ok", "failed", "missing", "skipped"}
    assert out["checks"][-1]["figures"] == {"amp": "bf16", "rate": None}


@pytest.mark.parametrize("name", [c.name for c in CHECKS])
def test_any_failure_is_6(capsys, name: str) -> None:
    failed = Finding(status=Status.FAILED, text="broken")
    code, out = report(capsys, by_name(**{name.replace(" ", "_"): failed}))
    assert code == out["exit_code"] == ExitCode.DEVICE
    assert out["ok"] is False
    assert [c["name"] for c in out["checks"] if c["status"] == "failed"] == [name]


def test_what_is_missing_is_no_failure(capsys) -> None:
    gone = Finding(status=Status.MISSING, text="not installed", advice="fast: pip install it")
    assert doctor.doctor_command(DoctorOptions(), run=by_name(dali=gone, NCCL=gone)) == ExitCode.DONE
    text = capsys.readouterr().out
    assert text.count("→ fast: pip install it") == 2
    assert "2 missing" in text
    assert "\x1b" not in text


def test_later_checks_get_the_device_of_the_first() -> None:
    seen: list[tuple[str, Target]] = []

    def run(check: Check, target: Target) -> Result:
        seen.append((check.name, target))
        finding = Finding(text="", figures={"device": "cuda:0", "visible": 4} if check == DEVICE else {})
        return Result(check, finding, 0.0)

    doctor.doctor_command(DoctorOptions(json=True), run=run)
    assert (seen[0][0], seen[0][1].device) == ("device", "auto")
    assert {(target.device, target.gpus) for _, target in seen[1:]} == {("cuda:0", 4)}
    assert not os.path.exists(seen[0][1].scratch)


def test_only_one_group(capsys) -> None:
    _, out = report(capsys, by_name(), only="distributed")
    assert [c["name"] for c in out["checks"]] == ["device", "gloo", "NCCL"]
    assert out["use"] is None


def test_text_from_elsewhere_cannot_change_the_terminal(capsys) -> None:
    odd = Finding(status=Status.FAILED, text="\x1b[31m [bold]red[/bold]\n", advice="a\rb")
    doctor.doctor_command(DoctorOptions(), run=by_name(disk=odd))
    text = capsys.readouterr().out
    assert "[bold]red[/bold]" in text
    assert not {"\x1b", "\r"} & set(text)


def test_the_command_line_returns_the_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = doctor.doctor_command
    for status, code in ((Status.OK, ExitCode.DONE), (Status.FAILED, ExitCode.DEVICE)):
        run = by_name(disk=Finding(status=status, text=""))
        command = doctor.doctor_command
        monkeypatch.setattr(
            doctor, "doctor_command", lambda options, run=run, command=command: command(options, run=run)
        )
        assert main(["doctor", "--json"]) == code
        monkeypatch.undo()
        json.loads(capsys.readouterr().out)


def test_options_are_checked() -> None:
    assert parse_doctor(["--json", "--device", "cpu", "--only", "kernels"]).only == "kernels"
    for arguments, message in (
        (["--data", "/nowhere"], "--data is '/nowhere', expected an existing folder"),
        (["--only", "kernel"], "kernel"),
        (["--jsn"], "did you mean --json"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_doctor(arguments)


def test_every_check_is_there() -> None:
    assert len({c.name for c in CHECKS}) == len(CHECKS)
    assert set(GROUPS) == {"machine", "device", "kernels", "loading", "step", "distributed"}
    for each in CHECKS:
        assert callable(load(each.run)), each


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_tries_every_part(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its time is not asserted: it is under a minute on two idle cores."""
    patient = [each._replace(limit_s=800.0) for each in CHECKS]
    code = doctor.doctor_command(DoctorOptions(json=True, device="cpu", data=str(tmp_path)), patient)
    out = json.loads(capfd.readouterr().out)
    by_name = {entry["name"]: entry for entry in out["checks"]}
    assert [entry for entry in by_name.values() if entry["status"] == "failed"] == []
    assert code == ExitCode.DONE
    assert by_name.keys() == {each.name for each in CHECKS}
    skipped = {name for name, entry in by_name.items() if entry["status"] == "skipped"}
    assert skipped == {"triton", "1×1 convolution", "CUDA graph", "NCCL"}
    tried = by_name.keys() - skipped - {n for n, entry in by_name.items() if entry["status"] == "missing"}
    assert all(by_name[name]["figures"] for name in tried)
    assert out["use"]["device"] == "cpu"
    assert os.listdir(tmp_path) == []
