"""A pytest plugin that writes what the run of fault tests saw: one row a test, as JSON and as a page of Markdown.

    python -m pytest -m faults -p tests.fault_report --fault-report benchmarks/results/2026-11-26-faults

What was injected is the `faults` marker's word, what must hold is the test's name, and its docstring where it has one;
so neither is written down a second time. A test with parameters is one row that counts its cases.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

OUTCOMES = ("passed", "skipped", "failed")  # from best to worst


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-report", type=Path, metavar="BASE", help="Write BASE.json and BASE.md.")


def pytest_configure(config: pytest.Config) -> None:
    base = config.getoption("--fault-report")
    if base is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultReport(base))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is told of each test on the test itself, so that it crosses to whoever writes the report."""
    for item in items:
        marker = item.get_closest_marker("faults")
        if marker is not None:
            if not marker.args:
                raise pytest.UsageError(f"{item.nodeid}: the faults marker says what is injected")
            words = " ".join((getattr(item, "function", item).__doc__ or "").split())
            item.user_properties += [("injected", marker.args[0]), ("docstring", words)]


class FaultReport:
    def __init__(self, base: Path) -> None:
        self._base, self._began = base, time.time()
        self._rows: dict[str, dict[str, Any]] = {}
        from skerry.benchmarks.fingerprint import fingerprint

        self._environment = fingerprint()  # before anything runs: the machine's load is that of others

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "injected" not in properties:
            return
        test = report.nodeid.partition("[")[0]
        row = self._rows.setdefault(test, {
            "injected": properties["injected"], "expected": sentence(test), "why": properties["docstring"],
            "test": test, "outcome": "passed", "cases": 0, "seconds": 0.0,
        })  # fmt: skip
        row["outcome"] = max(row["outcome"], report.outcome, key=OUTCOMES.index)
        row["cases"] += report.when == "call"
        row["seconds"] = round(row["seconds"] + report.duration, 3)
        if report.outcome != "passed":
            row["cause"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[-500:]

    def pytest_sessionfinish(self) -> None:
        from skerry.core.files import write_atomic, write_json

        rows = [self._rows[test] for test in sorted(self._rows)]
        began = datetime.fromtimestamp(self._began, UTC)
        document = {
            "schema": 2, "level": "faults", "began": began.isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._began, 1), "environment": self._environment, "notes": ["make faults"],
            "outcomes": {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in OUTCOMES},
            "faults": rows,
        }  # fmt: skip
        self._base.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._base.with_name(self._base.name + ".json"), document)
        write_atomic(self._base.with_name(self._base.name + ".md"), page(document))


def sentence(test: str) -> str:
    """The test's name in words."""
    return test.rpartition("::test_")[2].replace("_", " ")


def page(document: dict[str, Any]) -> str:
    """One table for each file of tests. Cases: how many variants of the fault were tried."""
    environment, counts = document["environment"], document["outcomes"]
    git = environment["git"] or {"commit": "unknown", "dirty": None}
    lines = [
        "# Faults injected, and what came of them",
        "",
        f"{document['began']}, commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}, "
        f"{environment['cpu']}, {environment['cores_usable']} cores, "
        f"load {environment['load_average']} before the run, {document['seconds']:.0f} s. "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        + ". Made by `make faults`; what must hold is the test's name.",
    ]
    file = None
    for row in document["faults"]:
        here = row["test"].partition("::")[0]
        if here != file:
            file = here
            lines += ["", f"## `{file}`", "", "| injected | must hold | outcome | cases | s |", "|---|---|---|---|---|"]
        expected = f"{row['expected']}. {row['why']}" if row["why"] else row["expected"]
        cells = (row["injected"], expected, row["outcome"], str(row["cases"]), f"{row['seconds']:.2f}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
