"""The serve level over real servers: what it measures, what it keeps, and what it says when one is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from skerry.benchmarks.client import Client
from skerry.benchmarks.serve import OURS, Sweep, curve, figures, rows, sweep
from skerry.benchmarks.server import COMMAND, ask, open_server, started
from skerry.benchmarks.starts import measure_starts
from skerry.benchmarks.traffic import Traffic, from_trace, prompts
from skerry.core.bundle import open_bundle
from skerry.core.errors import InputError, Unavailable, UsageError

POINT = Traffic("fixed", requests=4, concurrency=2, prompt_tokens=16, output_tokens=8, temperature=1.0)


def skerry(*words: Any) -> list[str]:
    return [sys.executable, "-m", "skerry.core", "bench", *map(str, words)]


def test_two_servers_side_by_side(served_bundle):
    found = Sweep()
    with open_server(str(served_bundle), 1) as ours, open_server(str(served_bundle), 1) as other, Client() as client:
        assert ours.start_seconds and ours.first_token_seconds and ours.first_token_seconds > ours.start_seconds
        sweep(found, {OURS: ours, "twin": other}, [POINT], 6, None, client, 0, lambda line: None)
        side = ours.to_json()
    assert side["peak_rss"] > 1 << 20 and side["engine_bytes"] > 0 and side["precision"] == "fp32"
    assert len(found.requests) == 2 * 6 * 4 and not found.notes
    mine = figures(found, OURS)
    assert {"ttft_c2", "throughput_c2", "e2e_c2"} <= mine.keys() and len(mine["e2e_c2"].values) == 6
    assert mine["e2e_c2"].median > mine["ttft_c2"].median > 0
    (row,) = [one for one in rows(found, {"twin": "1"}) if one["measure"].startswith("output tokens")]
    assert 0.1 < row["low"] <= row["ratio"] <= row["high"] < 10 and row["peer_version"] == "1"
    assert {one["side"] for one in curve(found)} == {OURS, "twin"}


def test_a_side_that_goes_away_is_dropped_with_a_note(served_bundle):
    found = Sweep()
    with open_server(str(served_bundle), 1) as ours, open_server(str(served_bundle), 1) as other, Client() as client:

        def report(line: str) -> None:
            if line.startswith("repeat 2"):
                assert other.pid
                os.kill(other.pid, signal.SIGKILL)

        sweep(found, {OURS: ours, "twin": other}, [POINT], 4, None, client, 0, report)
        assert not other.alive() and ours.alive()
    assert len(found.values[(OURS, "c2", "e2e")]) == 4 and len(found.values[("twin", "c2", "e2e")]) == 2
    assert any("twin answered nothing" in note for note in found.notes)


def test_the_command_on_a_url_with_a_rate(served_bundle, tmp_path):
    with open_server(str(served_bundle), 1) as server:
        done = subprocess.run(
            skerry("serve", server.url, "--rate", 20, "--requests", 12, "--repeats", 2, "--output-tokens", 4,
                   "--prompt-tokens", 8, "--limit-e2e", 30, "--out", tmp_path, "--json"),
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["figures"]["e2e_due_r20"]["median"] > 0
    assert document["figures"]["good_fraction_r20"]["median"] == 1.0
    assert (
        "tokens_per_joule_r20" not in document["figures"] or document["figures"]["tokens_per_joule_r20"]["median"] > 0
    )
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and [row["due"] for row in lines[:12]] == sorted(row["due"] for row in lines[:12])


def test_starts_are_cold_and_warm(served_bundle):
    found = measure_starts(str(served_bundle), 1, 1, lambda line: None)
    assert found["start_warm"].median > 0 and (sys.platform != "linux" or found["start_cold"].median > 0)
    assert measure_starts(str(served_bundle), 1, 0, lambda line: None) == {}


def test_servers_that_do_not_start(tmp_path, free_port):
    with (
        pytest.raises(Unavailable, match="no bundle here"),
        started([sys.executable, "-c", "import sys; sys.exit('no bundle here')"], lambda line: None),
    ):
        pass
    with (
        pytest.raises(Unavailable, match="silent"),
        started([sys.executable, "-c", "import time; time.sleep(60)"], lambda line: None, seconds=0.5),
    ):
        pass
    with pytest.raises(Unavailable, match="ask"), open_server(f"http://127.0.0.1:{free_port}"):
        pass
    with pytest.raises(Unavailable):
        ask(f"http://127.0.0.1:{free_port}", "GET", "/")
    done = subprocess.run(skerry("serve", tmp_path / "none"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "neither a bundle's folder nor a URL" in done.stderr
    assert COMMAND[-1] == "serve"


def test_prompts_are_exact_and_never_the_same_twice(served_bundle):
    bundle = open_bundle(served_bundle)
    first, second = prompts(POINT, 1, bundle), prompts(POINT, 2, bundle)
    assert [len(one.prompt) for one in first] == [16] * 5 and [one.warm_up for one in first] == [True] + [False] * 4
    assert prompts(POINT, 1, bundle) == first
    assert not {one.prompt for one in first} & {one.prompt for one in second}
    rated = prompts(Traffic("chat", 8, None, 5.0), 1, None)
    assert [one.due for one in rated[1:]] == sorted(one.due for one in rated[1:]) and rated[-1].due > 0


def test_traffic_that_makes_no_sense(tmp_path):
    for wrong in ({"shape": "chatt"}, {"concurrency": 2, "rate": 1.0}, {"concurrency": None}, {"shape": "mooncake"}):
        with pytest.raises(UsageError):
            Traffic(**wrong)
    with pytest.raises(InputError, match="read trace"):
        from_trace(tmp_path / "none", None, 1, None, 10.0)


def test_a_trace_is_replayed_at_its_own_times(tmp_path, served_bundle):
    trace = tmp_path / "trace.jsonl"
    asked = [{"timestamp": 100 * i, "input_length": 20, "output_length": 4, "hash_ids": [i]} for i in range(6)]
    trace.write_text("".join(json.dumps(one) + "\n" for one in asked))
    traffic = from_trace(trace, None, 1, None, 10.0)
    planned = prompts(traffic, 0, open_bundle(served_bundle))
    assert [one.due for one in planned if not one.warm_up] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    turns = [[{"from": "human", "value": f"hello {i}"}, {"from": "gpt", "value": "hi there"}] for i in range(8)]
    (tmp_path / "chats.json").write_text(json.dumps([{"conversations": both} for both in turns]))
    assert len(prompts(from_trace(tmp_path / "chats.json", 5, 2, None, 10.0), 0, None)) == 6


def test_the_command_on_a_trace(tmp_path, served_bundle):
    """Its path is in the document too, as text."""
    trace = tmp_path / "trace.jsonl"
    asked = [{"timestamp": 20 * i, "input_length": 12, "output_length": 3, "hash_ids": [i]} for i in range(5)]
    trace.write_text("".join(json.dumps(one) + "\n" for one in asked))
    done = subprocess.run(
        skerry("serve", served_bundle, "--trace", trace, "--repeats", 1, "--starts", 0, "--json"),
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["points"][0]["trace"] == str(trace)


def test_an_error_on_the_way_is_one_document(tmp_path, served_bundle):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 12, "output_length": 3, "hash_ids": [1]}\nnonsense\n')
    done = subprocess.run(
        skerry("serve", served_bundle, "--trace", trace, "--starts", 0, "--out", tmp_path / "out", "--json"),
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 1 and "line 2" in json.loads(done.stdout)["error"]["message"]
    assert (tmp_path / "out" / "result.json").is_file()
