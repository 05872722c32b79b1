"""The client's own check: what it finds with the real processes, and what the command makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from skerry.benchmarks import selfcheck
from skerry.benchmarks.client import Client
from skerry.benchmarks.records import Planned, Run
from skerry.benchmarks.selfcheck import SERVICE, Check, Level, Omission, check, mock, read_truths
from skerry.core.cli import run
from skerry.core.errors import SkerryError


@pytest.fixture(scope="module")
def found() -> Check:
    """With a limit that any machine meets, one that none does, and a short queue."""
    said: list[str] = []
    result = check(said.append, {2: 30.0, 3: 0.0}, queued=4)
    assert len(said) == 3
    return result


@pytest.mark.slow
def test_a_level_beyond_its_limit_is_invalid(found):
    good, bad = found.levels
    assert (good.in_flight, good.ok, bad.in_flight, bad.ok, found.verdict) == (2, True, 3, False, "invalid")
    assert [reason for reason in found.reasons if "3 in flight" in reason]
    assert not [reason for reason in found.reasons if "2 in flight" in reason]
    for level in found.levels:
        assert level.requests == len(level.values) == 20 and 0 <= level.median <= level.p95
        assert level.own_median is not None and level.own_median >= 0
        assert min(level.values) >= -0.001, "an answer cannot be seen before it was sent"


@pytest.mark.slow
def test_waiting_counts_from_due(found):
    omission = found.omission
    assert omission is not None
    k = 0.99 * 3
    assert omission.expected == pytest.approx((k + 1) * SERVICE - k * 0.1)
    assert omission.scheduled_p99 >= omission.expected - 0.001, "the mock cannot have been faster"
    assert SERVICE - 0.001 <= omission.naive_p99 < omission.scheduled_p99


@pytest.mark.slow
def test_the_usual_check_says_more_than_3_seconds():
    """Of the omission alone: 12 requests are due within 1.1 s and take 6 s."""
    reasons: list[str] = []
    with mock(f"--ttft-ms={SERVICE * 1000}", "--tokens=1", "--slots=1") as url, Client() as client:
        omission = selfcheck.check_omission(client, url, selfcheck.QUEUED, reasons)
    assert omission.scheduled_p99 > 3.3 and omission.expected > 3.3


def test_the_mock_keeps_its_promise_and_knows_the_truth():
    """Not before its time, on an absolute schedule; and its record is forgotten once read."""
    with mock("--ttft-ms=60", "--tpot-ms=10") as url, Client() as client:
        client.run(Run(url, tuple(Planned(index, f"r{index}", 4) for index in range(3)), concurrency=3))
        truths = read_truths(url)
        assert sorted(truth["tag"] for truth in truths) == ["r0", "r1", "r2"] and read_truths(url) == []
    for truth in truths:
        assert truth["received"] <= truth["started"] and len(truth["written"]) == 4
        for token, at in enumerate(truth["written"]):
            assert at - truth["started"] >= 0.06 + token * 0.01 - 0.0005


def test_slots_make_a_queue():
    with mock("--ttft-ms=30", "--tokens=1", "--slots=1") as url, Client() as client:
        outcome = client.run(Run(url, tuple(Planned(index, f"r{index}", 1) for index in range(4)), concurrency=4))
        truths = read_truths(url)
    assert all(record.ok for record in outcome.records)
    for earlier, later in zip(truths, truths[1:]):  # noqa: RUF007
        assert later["started"] >= earlier["written"][-1] - 0.001


def test_a_mock_that_does_not_start(free_port):
    with (
        mock(f"--port={free_port}"),
        pytest.raises(SkerryError, match="ended with exit code"),
        mock(f"--port={free_port}"),
    ):
        pass


def test_the_mock_ends_with_its_stdin():
    words = [sys.executable, "-m", "skerry.benchmarks.mock", "--watch-stdin"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None and child.stdout.readline()
        child.stdin.close()
        assert child.wait(10) == 0


def example(median: float) -> Check:
    level = Level(1, 2, 0.002, median, median, median, None, None, 0.001, 0.0005, (median, median))
    reasons = [] if level.ok else ["1 in flight: TTFT is off"]
    return Check([level], Omission(12, 4.856, 4.9, 0.51), reasons)


@pytest.mark.parametrize(("median", "code", "verdict"), [(0.001, 0, "pass"), (0.003, 6, "invalid")])
def test_the_command(monkeypatch, capsys, tmp_path, median, code, verdict):
    monkeypatch.setattr(selfcheck, "check", lambda report: example(median))
    assert run(["bench", "selfcheck", "--json", "--out", str(tmp_path / "kept")]) == code
    document = json.loads(capsys.readouterr().out)
    assert (document["level"], document["verdict"], bool(document["reasons"])) == ("selfcheck", verdict, code == 6)
    assert document["levels"][0]["off_by_ms"] == median * 1000
    assert document["omission"] == {"requests": 12, "expected": 4.856, "scheduled_p99": 4.9, "naive_p99": 0.51}
    assert document["figures"]["ttft_error_1"]["values"] == [median * 1000] * 2
    assert json.loads((tmp_path / "kept" / "result.json").read_text()) == document
    assert run(["bench", "selfcheck"]) == code
    out = capsys.readouterr().out
    assert "4.9" in out and "0.51" in out and verdict in out
    assert json.loads(out.splitlines()[-1])["level"] == "selfcheck"


def test_the_mock_is_there_for_the_client_only():
    """It starts in a blink: no aiohttp, no numpy."""
    script = "import skerry.benchmarks.mock, sys; print([m for m in ('aiohttp', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.stdout.strip() == "[]"
