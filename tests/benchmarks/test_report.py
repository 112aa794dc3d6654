"""The report and the README agree with the results, report bottlenecks, and contain no paths of the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import loaders, readme_numbers, report
from benchmarks.measure import end_to_end
from benchmarks.measure.harness import run_script
from benchmarks.report import write_report
from benchmarks.reporting import headlines
from benchmarks.reporting.collected import Collection, keep, newest_by_hardware, read
from benchmarks.reporting.page import Bullets, Code, Heading, Picture, Table, Text, as_html, as_markdown
from fastmoco.errors import ConfigError
from pipelines.errors import DataError
from tests.benchmarks import sample_results as samples

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "2026-11-21-0123456"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Output of a suite: a result of every script, and a part that failed."""
    folder = tmp_path / "elsewhere" / "out"
    samples.write(
        folder,
        pipelines=samples.pipelines(),
        step=samples.step(),
        train=samples.train(),
        peers=samples.peers(),
        accuracy0=samples.accuracy(0, 4.0, 82.0),
        accuracy1=samples.accuracy(1, 6.0, 83.0),
        scaling=samples.scaling(),
    )
    failed = {"part": "step", "number": 1, "state": "failed", "seconds": 3.0, "limit_s": 60.0, "message": "disk full"}
    (folder / "step" / "part.json").write_text(json.dumps(failed))
    (folder / "suite.json").write_text(json.dumps({"suite": "cpu", "data": ["/somewhere/data"]}))
    return folder


def test_the_page_has_headlines_bottlenecks_tables_pictures_failures_and_commands(folder: Path) -> None:
    page, html = report.main(report.Settings(results=folder))
    text = page.read_text(encoding="utf-8")
    assert "`resident`: **500 images/s**, 5.0 times a plain DataLoader" in text
    assert "`trainstep`: **60.0 images/s**, 3.0 times the plain step" in text
    assert "2.0 times a plain DataLoader with a plain step, 50% of the step alone" in text
    assert "5.0 times lightly, 2.5 times the authors' code at its best" in text
    assert "to 80 % kNN, cifar10-demo, 200 epochs: **5.00 min**, 82.5 % at the end, 2 seeds" in text
    assert "`resident` **the input** (50% of the step's own rate, waits 40 % of the time)" in text
    assert "| trainstep | + no stored logits, no host read | 60.0 (54.0–66.0) | 3.00× |" in text
    assert "Not measured: dali (nvidia.dali is not installed" in text
    assert "step: disk full" in text
    assert "uv run python benchmarks/script.py" in text
    for name in re.findall(r"\]\((\S+\.svg)\)", text):
        assert (folder / name).read_text(encoding="utf-8").startswith("<svg")
    html_text = html.read_text(encoding="utf-8")
    assert html_text.count("<svg") == text.count(".svg)") >= 5
    assert not re.search(r'(src|href)="(?!#)', html_text.replace("http://www.w3.org", ""))
    names = re.findall(r'\bid="([^"]+)"', html_text)
    assert len(names) == len(set(names))


def test_a_target_that_a_seed_missed_is_not_reported_as_reached(folder: Path) -> None:
    samples.write(folder, accuracy2=samples.accuracy(2, None, 79.0))
    lines = [str(line) for line in headlines.headlines(read(folder))]
    assert "to 80 % kNN, cifar10-demo, 200 epochs: **reached by 2 of 3**, 82.0 % at the end" in lines


def test_a_run_on_few_images_is_in_the_tables_but_no_headline(tmp_path: Path) -> None:
    result = samples.accuracy(0, 4.0, 82.0)
    result["recipes"]["cifar10-demo"]["runs"]["0"]["config"]["limit"] = 2500
    folder = samples.write(tmp_path / "out", accuracy=result)
    assert headlines.headlines(read(folder)) == []
    text = report.main(report.Settings(results=folder))[0].read_text(encoding="utf-8")
    assert "cifar10-demo, 200 epochs, 2,500 images" in text


def test_with_a_loader_that_costs_nothing_the_step_is_the_bottleneck() -> None:
    limits = headlines.bottlenecks(Collection({"train": samples.train(0.97)}))
    assert "`resident` **the step** (97% of the step's own rate" in limits[0]


def test_the_names_of_the_baselines_are_those_of_the_scripts() -> None:
    assert (headlines.BASELINE, headlines.PLAIN) == (loaders.BASELINE, end_to_end.PLAIN)


def test_committed_results_are_one_file_with_the_same_content_and_without_paths(folder: Path, tmp_path: Path) -> None:
    written = report.main(report.Settings(results=folder, commit="test-cpu"), tmp_path / "results")
    kept = tmp_path / "results" / "test-cpu" / f"{COMMIT}.json"
    assert kept in written
    content = kept.read_text(encoding="utf-8")
    assert "/somewhere" not in content
    assert "/elsewhere" not in content
    assert "name-of-a-machine" not in content
    assert "Linux-6.18-x86_64-with-glibc2.36" in content
    assert "--data DATA/cifar10" in content
    again, before = read(kept), read(folder)
    assert {name: result["benchmark"] for name, result in again.results.items()} == {
        name: result["benchmark"] for name, result in before.results.items()
    }
    page = kept.with_suffix(".md").read_text(encoding="utf-8")
    assert "5.0 times lightly" in page
    assert all((kept.parent / name).is_file() for name in re.findall(r"\]\((\S+\.svg)\)", page))


def test_quick_results_are_marked_and_not_committed(tmp_path: Path) -> None:
    result = samples.pipelines()
    result["settings"]["quick"] = True
    folder = samples.write(tmp_path / "out", pipelines=result)
    assert "Measured with --quick" in report.main(report.Settings(results=folder))[0].read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="--quick"):
        keep(folder, "test-cpu", tmp_path / "results")


@pytest.mark.parametrize("hardware", ["", "../elsewhere", "H200", "a/b"])
def test_a_hardware_name_that_is_no_folder_name_is_refused(folder: Path, hardware: str) -> None:
    with pytest.raises(ConfigError, match="lower-case letters"):
        keep(folder, hardware)


def test_an_empty_folder_and_a_damaged_file_are_different_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no results"):
        read(tmp_path)
    (tmp_path / "step.json").write_text("{")
    with pytest.raises(DataError, match=r"step\.json cannot be read"):
        read(tmp_path)


def test_the_latest_version_of_each_result_counts(tmp_path: Path) -> None:
    old, new = samples.pipelines(200.0), samples.pipelines(700.0)
    new["environment"]["date"] = "2026-12-01T00:00:00+00:00"
    keep(samples.write(tmp_path / "old", pipelines=old, step=samples.step()), "test-cpu", tmp_path / "results")
    keep(samples.write(tmp_path / "new", pipelines=new), "test-cpu", tmp_path / "results")
    ((hardware, collection),) = newest_by_hardware(tmp_path / "results")
    assert hardware == "test-cpu"
    assert set(collection.results) == {"pipelines/pipelines", "step/step"}
    assert collection.results["pipelines/pipelines"]["cases"]["resident"]["images_per_s"]["median"] == 700.0


def test_the_readme_is_written_once_and_then_agrees(folder: Path, tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    keep(folder, "test-cpu", results)
    readme.write_text(f"# A\n\n{readme_numbers.BEGIN}\nold: 9,999\n{readme_numbers.END}\n\nThe end.\n")
    check = readme_numbers.Settings(check=True)
    with pytest.raises(ConfigError, match="differs from benchmarks/results"):
        readme_numbers.main(check, readme, results)
    assert readme_numbers.main(readme_numbers.Settings(), readme, results)
    text = readme.read_text(encoding="utf-8")
    assert "| 500 images/s | 5.0 times a plain DataLoader |" in text
    assert "9,999" not in text
    assert text.startswith("# A\n\n")
    assert text.endswith("\n\nThe end.\n")
    assert not readme_numbers.main(check, readme, results)
    readme.write_text(text.replace("500 images/s", "501 images/s"))
    with pytest.raises(ConfigError, match="differs from benchmarks/results"):
        readme_numbers.main(check, readme, results)


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A\n")
    with pytest.raises(ConfigError, match="no markers for the numbers"):
        readme_numbers.main(readme_numbers.Settings(), tmp_path / "README.md", tmp_path)


def test_the_readme_of_this_checkout_has_the_committed_numbers() -> None:
    assert not readme_numbers.main(readme_numbers.Settings(check=True))


def test_the_committed_results_make_reports(tmp_path: Path) -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        (page,) = write_report(read(file), tmp_path / file.stem, html=False)
        assert page.read_text(encoding="utf-8") == file.with_suffix(".md").read_text(encoding="utf-8")


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: report.main(report.Settings(results=tmp_path)))
    assert ended.value.code == 2
    assert re.fullmatch(r".*: error: .* holds no results: .*\n", capsys.readouterr().err)


def test_text_is_escaped() -> None:
    blocks = [
        Heading("A < B"),
        Text("`a<b>` and **bold** & more"),
        Bullets(["one"]),
        Table(("name", "value"), [("a|b", "<1>")]),
        Code(["run <x>"]),
        Picture("p", '<svg><g id="m"/><use href="#m"/><path clip-path="url(#m)"/></svg>', "a picture"),
    ]
    markdown = as_markdown(blocks, lambda name: f"page-{name}.svg")
    assert "| a\\|b | <1> |" in markdown
    assert "![a picture](page-p.svg)" in markdown
    html = as_html("title", blocks)
    assert "<h2>A &lt; B</h2>" in html
    assert "<code>a&lt;b&gt;</code> and <strong>bold</strong> &amp; more" in html
    assert "<td>&lt;1&gt;</td>" in html
    assert 'id="p-m"' in html
    assert 'href="#p-m"' in html
    assert "url(#p-m)" in html
