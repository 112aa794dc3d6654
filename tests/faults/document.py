"""docs/reliability.md, generated from the tests, so that it promises what they show.

python -m tests.faults.document
"""

from __future__ import annotations

import ast
import html
from pathlib import Path

from pipelines.files import write_atomically
from tests.faults.matrix import MATRIX

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
INTRODUCTION = """# Reliability

What fastmoco does when something goes wrong. Every line names the test that shows it; this page is generated from the
tests (`uv run python -m tests.faults.document`), and continuous integration fails if it differs from them.

Whatever the fault, a command ends with one line that names the file or the setting and the remedy, leaves no process
and no shared memory behind, and never replaces anything silently. Exit codes, which are in `status.json` of a run, too:
0 done, 2 configuration, 3 data, 4 checkpoint or output, 5 diverged, 6 device or memory, 75 stopped and resumable.

1. **The same inputs always.** Seed and step determine which images, crops and colours a step sees: on every pipeline,
   for any number of workers, and for any number of ranks with the same total batch.
2. **The same weights on resume.** With `--deterministic`, on the same kind of device and number of ranks, a run that
   was stopped or killed and resumed equals one that was not, tensor for tensor.
3. **A checkpoint is whole or absent.** It is written under a temporary name, flushed to disk, and then renamed; its
   SHA-256 is compared before it is loaded.
4. **Nothing executes.** Checkpoints and backbones hold tensors and text; sizes are checked before memory is allocated.
5. **What is read is what was written.** Data archives, features and backbones carry hashes, which are compared when
   they are read.
"""


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, rows in MATRIX.items():
        parts.append(f"## {title}\n\n| fault | what happens | tests |\n|---|---|---|\n")
        for row in rows:
            links = ", ".join(_link(*test.split("::"), short=True) for test in row.tests)
            parts[-1] += f"| {row.fault} | {row.outcome} | {links} |\n"
    for file in sorted((TESTS / "faults").glob("test_fault_*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        lines = [f"## {_first_line(module).rstrip('.')}\n"]
        name = file.relative_to(TESTS).as_posix()
        lines += [f"- {_first_line(test)} {_link(name, test.name)}" for test in functions(module)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def functions(module: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    """Its tests: functions, and state machines of Hypothesis."""
    return [
        node
        for node in module.body
        if (isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
        or (isinstance(node, ast.ClassDef) and any(base.attr == "TestCase" for base in _attributes(node)))
    ]


def _attributes(node: ast.ClassDef) -> list[ast.Attribute]:
    return [base for base in node.bases if isinstance(base, ast.Attribute)]


def _first_line(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    """The first paragraph of a docstring; its characters have no meaning in Markdown."""
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return html.escape(text, quote=False).replace("*", "\\*")


def _link(file: str, test: str, *, short: bool = False) -> str:
    name = test.removeprefix("test_").replace("_", " ")
    return f"[{name}](../tests/{file})" if short else f"([test](../tests/{file}))"


if __name__ == "__main__":
    write_atomically(DOCUMENT, document())
