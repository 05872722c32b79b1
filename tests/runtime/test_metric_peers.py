"""Several workers behind one socket: a scrape of any of them is one of all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families

from skerry.runtime import metric_peers
from skerry.runtime.metric_peers import MetricPeers, joined, labelled


def worker(requests: int, seconds: float) -> Callable[[str], tuple[bytes, str]]:
    registry = CollectorRegistry()
    Counter("skerry_requests", "Requests", ["model_name"], registry=registry).labels("tides").inc(requests)
    Histogram("vllm:e2e_request_latency_seconds", "Seconds", buckets=(1, 5), registry=registry).observe(
        seconds, exemplar={"trace_id": "ab{c"}
    )
    return lambda accept: (
        openmetrics.generate_latest(registry, "allow-utf-8") if "openmetrics" in accept else generate_latest(registry),
        "kind",
    )


def ask(directory: Path, accept: str = "") -> str:
    async def run() -> str:
        peers = [MetricPeers(directory, f"GPU-{n}", worker(n + 1, n)) for n in range(3)]
        for peer in peers:
            peer._path = peer._path.with_name(f"{peer._name}.{peer._name[-1]}")  # of processes of their own
            await peer.start()
        try:
            return (await peers[1].exposition(accept))[0].decode()
        finally:
            for peer in peers:
                peer.close()

    return asyncio.run(run())


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_one_scrape_has_every_worker_once(tmp_path: Path, accept: str) -> None:
    text = ask(tmp_path, accept)
    families = list((open_families if accept else text_string_to_metric_families)(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)) and text.endswith("# EOF\n" if accept else "\n")
    samples = [sample for family in families for sample in family.samples]
    totals = {s.labels["worker"]: s.value for s in samples if s.name == "skerry_requests_total"}
    assert totals == {"GPU-0": 1.0, "GPU-1": 2.0, "GPU-2": 3.0}
    slowest = [s for s in samples if s.name.endswith("_bucket") and s.labels["le"] == "1.0"]
    assert {s.labels["worker"]: s.value for s in slowest} == {"GPU-0": 1.0, "GPU-1": 1.0, "GPU-2": 0.0}
    assert list(tmp_path.iterdir()) == []


def test_who_is_gone_or_hangs_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metric_peers, "ASK_SECONDS", 0.2)
    dead, deaf = tmp_path / "GPU-dead.1", tmp_path / "GPU-deaf.1"
    with socket.socket(socket.AF_UNIX) as left, socket.socket(socket.AF_UNIX) as silent:
        left.bind(str(dead))
        silent.bind(str(deaf))
        silent.listen()
        text = ask(tmp_path)
    assert 'worker="GPU-2"' in text and "GPU-dead" not in text and not dead.exists()
    assert "metrics of GPU-deaf.1 are missing" in caplog.text


def test_samples_are_labelled_wherever_braces_are() -> None:
    assert labelled("up 1", "a") == 'up{worker="a"} 1' and labelled("up{} 1", "a") == 'up{worker="a"} 1'
    assert labelled('x{b="} {"} 2 # {t="1"} 3', "a") == 'x{worker="a",b="} {"} 2 # {t="1"} 3'
    assert labelled('x 2 # {t="1"} 3', "a") == 'x{worker="a"} 2 # {t="1"} 3'
    assert joined([("a", "# HELP x X\n# TYPE x gauge\nx 1\n"), ("b", "# HELP x X\n# TYPE x gauge\nx 2\n")]) == (
        '# HELP x X\n# TYPE x gauge\nx{worker="a"} 1\nx{worker="b"} 2\n'
    )
