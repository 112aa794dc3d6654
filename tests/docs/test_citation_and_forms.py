"""CITATION.cff and the forms for issues are valid, and say what is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def test_the_citation_is_that_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert [reference["year"] for reference in citation["references"]] == [2020, 2020]


def test_the_citation_has_what_the_format_requires() -> None:
    """Citation File Format 1.2.0: of the software and of every reference; other keys are refused by its readers."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    for work in (citation, *citation["references"]):
        assert {"title", "authors", "type"} <= set(work)
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    known = "cff-version message title abstract type version license authors keywords references url repository-code"
    assert set(citation) <= {*known.split(), "date-released", "doi", "identifiers", "contact"}
    assert all(reference["type"] in ("article", "conference-paper") for reference in citation["references"])


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_requires(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(content)
    ids = [part["id"] for part in content["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    for part in content["body"]:
        assert part["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert part["attributes"].get("label") or part["attributes"].get("value")
    for name in re.findall(r"docs/[\w/.-]+\.md|SECURITY\.md", form.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_a_bug_comes_with_what_the_doctor_says() -> None:
    bug = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
    doctor = next(part for part in bug["body"] if part.get("id") == "doctor")
    assert "fastmoco doctor --json" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]
