"""The stand-in itself."""

from __future__ import annotations

from tests.standin.run import run_program


def test_torch_runs_on_the_standin_which_sees_calls_and_refuses_illegal_captures() -> None:
    found = run_program("smoke")
    assert found["device"] == "stand-in for an H100"
    assert found["kernels"] >= 3
    assert [copy.split()[1:4] for copy in found["copies"]] == [
        ["H2D", "16", "pinned"],
        ["H2D", "16", "pageable"],
        ["D2H", "4", "pinned"],
    ]
    assert [wait.split()[0] for wait in found["waits"]] == ["cudaMemcpyAsync", "cudaStreamSynchronize"]
    assert found["violations"] == 0
    assert found["joined"] == ""
    assert "unjoined" in found["not joined"]
    assert "previous error during capture" in found["waiting"]
    assert found["progress"] == [False, False, True]
