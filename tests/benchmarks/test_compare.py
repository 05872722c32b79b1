"""The whole comparison over real servers, with faults of every kind put into one of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from skerry.benchmarks.client import Client
from skerry.benchmarks.compare import Comparison, QualityPlan, compare, incomparable, turns_of
from skerry.benchmarks.gates import Gates
from skerry.benchmarks.pair import Pair, start_orders
from skerry.benchmarks.server import Server, open_server
from skerry.benchmarks.traffic import Traffic
from skerry.benchmarks.verdict import Verdict
from skerry.core.errors import UsageError

INJECTED = (sys.executable, "-m", "skerry.benchmarks.studies.injected")
# A budget that no noise of a busy machine reaches: these tests are about faults, not about speed.
GATES = Gates(metrics=("e2e",), budget=9.0, blocks=8, max_blocks=8)
TRAFFIC = Traffic("fixed", requests=4, concurrency=2, prompt_tokens=16, output_tokens=16, temperature=1.0)
ASKED = QualityPlan(32, 24)


@pytest.fixture
def run(served_bundle):
    """run(*fault of B) -> (what was found, verdict). `spoil(a, b)` is called before block 3."""

    def one(
        *fault: str, gates: Gates = GATES, spoil: Any = None, asked: QualityPlan | None = ASKED, lives: int = 4
    ) -> Any:
        found = Comparison(gates)
        alive: dict[str, Server] = {}

        @contextmanager
        def side(name: str, *words: str) -> Iterator[Server]:
            with open_server(str(served_bundle), 1, command=(*INJECTED, *words, "serve")) as server:
                alive[name] = server
                yield server

        def report(line: str) -> None:
            if spoil and line.startswith("block 2"):
                spoil(alive)

        pair = Pair(partial(side, "a"), partial(side, "b", *fault), blocks=lives)
        with Client() as client:
            verdict: Verdict = compare(found, pair, TRAFFIC, client, 1, report, asked)
        return found, verdict

    return one


def test_two_of_the_same_pass(run):
    found, verdict = run()
    assert verdict.verdict == "pass", verdict.reasons
    assert found.quality and found.quality.agreement == 1.0 and found.quality.length_ratio == 1.0
    assert len(found.blocks) == 8 and len(found.requests) == 8 * 4 * 2
    assert len(found.lives) == 3 and len({life["a"]["url"] for life in found.lives}) == 3  # quality, then two


def test_an_engine_that_cuts_answers_short_is_rejected(run):
    _, verdict = run("--truncate", "0.5")
    assert verdict.verdict == "regressed" and any("shorter" in reason for reason in verdict.reasons)
    _, verdict = run("--truncate", "0.5", asked=None)  # also by the timed requests alone
    assert verdict.verdict == "regressed" and any("shorter" in reason for reason in verdict.reasons)


def test_an_engine_that_answers_differently_is_rejected(run):
    found, verdict = run("--noise", "1.0")
    assert verdict.verdict == "regressed" and found.quality and found.quality.verdict == "regressed"
    assert any("differently" in reason for reason in verdict.reasons)


def test_a_server_that_dies_half_way(run):
    def kill(server: Server) -> None:
        assert server.pid
        os.kill(server.pid, signal.SIGKILL)

    found, verdict = run(spoil=lambda alive: kill(alive["b"]))
    assert verdict.verdict == "regressed" and "B failed" in verdict.reasons[0]
    assert 2 <= len(found.blocks) < 8 and any(row["error"] for row in found.requests)
    found, verdict = run(spoil=lambda alive: kill(alive["a"]))
    assert verdict.verdict == "invalid" and "A failed" in verdict.reasons[0]
    assert len(found.blocks) >= 2


@pytest.mark.parametrize(("requests", "size"), [(16, 4), (6, 4), (1, 1), (5, 1), (12, 3)])
def test_turns_are_balanced_and_lose_nothing(requests, size):
    seen = set()
    for seed in range(20):
        turns = turns_of(requests, size, random.Random(seed))
        for side in (0, 1):
            assert sorted(index for who, piece in turns if who == side for index in piece) == list(range(requests))
        assert all(len(piece) <= size for _, piece in turns)
        quads = ["".join("ab"[who] for who, _ in turns[first : first + 4]) for first in range(0, len(turns), 4)]
        assert set(quads) <= {"abba", "baab", "ab", "ba"}
        seen.update(quads)
    assert len(seen) >= 2


def test_each_side_starts_first_once_in_two_lives():
    orders = start_orders(random.Random(0))
    drawn = [(next(orders), next(orders)) for _ in range(40)]
    assert all(first != second for first, second in drawn) and len(Counter(drawn)) == 2


def test_what_cannot_be_compared():
    here, there = (Server(host, f"http://{host}:1", "url") for host in ("127.0.0.1", "10.0.0.2"))
    assert "other hardware" in incomparable(here, there)[0]
    assert incomparable(here, here) == []


def test_a_target_that_is_none(tmp_path):
    with pytest.raises(UsageError, match="neither"), open_server(str(tmp_path / "none")):
        pass
    with pytest.raises(UsageError, match="no http"), open_server("ftp://somewhere"):
        pass


def skerry(*words: Any) -> list[str]:
    return [sys.executable, "-m", "skerry.core", "bench", *map(str, words)]


def test_the_command_keeps_everything_it_measured(served_bundle, tmp_path):
    out, history = tmp_path / "out", tmp_path / "history.jsonl"
    done = subprocess.run(
        skerry("compare", served_bundle, served_bundle, "--requests", 4, "--prompt-tokens", 16, "--output-tokens", 8,
               "--metric", "e2e:9", "--blocks", 8, "--max-blocks", 8, "--quality-prompts", 32, "--quality-tokens", 24,
               "--threads", 1, "--restart-every", 4, "--out", out, "--history", history, "--json"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert done.returncode == {"pass": 0, "inconclusive": 6, "invalid": 6}[document["comparison"]["verdict"]], (
        done.stderr
    )
    assert document["comparison"]["quality"]["verdict"] == "pass"
    assert {file.name for file in out.iterdir()} == {
        "result.json", "requests.jsonl", "result.csv", "summary.md", "report.html",
    }  # fmt: skip
    assert len((out / "requests.jsonl").read_text().splitlines()) == 8 * 4 * 2
    assert json.loads((out / "result.json").read_text()) == document
    assert "<script" not in (out / "report.html").read_text().lower()
    assert history.read_text().count("\n") >= 1


def test_an_interrupt_keeps_the_data_so_far(served_bundle, tmp_path):
    out = tmp_path / "out"
    child = subprocess.Popen(
        skerry("compare", served_bundle, served_bundle, "--requests", 4, "--blocks", 900, "--max-blocks", 900,
               "--quality-prompts", 2, "--quality-tokens", 4, "--output-tokens", 8, "--threads", 1, "--out", out),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stderr
    for line in child.stderr:
        if "block 3 of" in line:
            child.send_signal(signal.SIGINT)
            break
    rest = child.stderr.read()
    assert child.wait(60) == 130, rest
    document = json.loads((out / "result.json").read_text())
    assert document["comparison"]["verdict"] == "invalid" and "interrupted" in document["comparison"]["reasons"]
    assert document["comparison"]["blocks"] >= 3
    left = [line for line in Path("/proc").glob("[0-9]*/cmdline") if str(served_bundle) in _read(line)]
    deadline = time.monotonic() + 10
    while left and time.monotonic() < deadline:
        left = [line for line in left if str(served_bundle) in _read(line)]
    assert not left


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
