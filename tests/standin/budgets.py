"""Rewrites `budgets.json` with what the steps of this checkout need.

python -m tests.standin.budgets       from the project's root
"""

from __future__ import annotations

import json

from tests.standin.checks import BUDGETS, GROUPS, budgets, numbers, torch_version
from tests.standin.run import run_program


def main() -> None:
    before = budgets() if BUDGETS.is_file() else {"steps": {}}
    steps: dict[str, dict[str, int]] = {}
    for modes in GROUPS:
        for mode, report in run_program("step", *modes).items():
            steps[mode] = numbers(report)
            if steps[mode] != (old := before["steps"].get(mode)):
                print(f"{mode}: {old} → {steps[mode]}")
    BUDGETS.write_text(json.dumps({"torch": torch_version(), "steps": steps}, indent=2) + "\n")


if __name__ == "__main__":
    main()
