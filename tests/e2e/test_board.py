"""A real Prometheus scrapes a real node under load, and every expression of vLLM's Grafana board finds data there.

The board is not part of this repository: SKERRY_BOARD names a copy of it (examples/observability/prometheus_grafana/
grafana.json of vLLM's source). Without one, expressions of the same forms are made from the series that it selects.
SKERRY_BOARD_SECONDS says how long the load lasts.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.runtime.board import BOARD

if TYPE_CHECKING:
    from skerry.core.bundle import Bundle

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.alone]
SECONDS = int(os.environ.get("SKERRY_BOARD_SECONDS", "20"))
PROMETHEUS = shutil.which("prometheus")


def of_series() -> list[str]:
    """What the board asks of each kind of series: quantiles and means of histograms, rates of counters, gauges."""
    made = []
    for name, (suffixes, labels) in BOARD.items():
        for suffix in suffixes:
            one = f'{name}{suffix}{{model_name="$model_name"}}'
            if suffix == "_bucket":
                made.append(f"histogram_quantile(0.9, sum by(le) (rate({one}[$__rate_interval])))")
            elif labels:
                made.append(f"sum by({', '.join(labels)}) (increase({one}[$__rate_interval]))")
            else:
                made.append(f"rate({one}[$__rate_interval])" if suffix else one)
    return made


def of_board(path: Path) -> list[str]:
    """Every panel's expressions, those of rows' inner panels among them."""
    found, panels = [], list(json.loads(path.read_text(encoding="utf-8"))["panels"])
    while panels:
        panel = panels.pop(0)
        panels += panel.get("panels", [])
        found += [target["expr"] for target in panel.get("targets", [])]
    return found


@pytest.fixture
def prometheus(served: str, tmp_path: Path, free_port: int) -> Iterator[str]:
    """Scrapes the node each second."""
    settings = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "node", "static_configs": [{"targets": [served.removeprefix("http://")]}]}],
    }  # fmt: skip
    (tmp_path / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    assert PROMETHEUS
    process = subprocess.Popen(
        [PROMETHEUS, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
         f"--web.listen-address=127.0.0.1:{free_port}", "--log.level=error"],
    )  # fmt: skip
    url = f"http://127.0.0.1:{free_port}"
    try:
        deadline = time.monotonic() + 60
        while not _ready(url):
            assert process.poll() is None and time.monotonic() < deadline, "prometheus does not start"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def served(smollm2: Bundle, serve: Callable[..., str]) -> str:
    return serve(smollm2.path)


def keep_busy(url: str, until: float) -> int:
    """Six clients, whole answers and streams; how many requests were answered."""

    def client(number: int) -> int:
        body = {"messages": [{"role": "user", "content": f"{number}: tell me of the sea"}], "max_tokens": 24}
        count = 0
        with httpx.Client(base_url=url, timeout=120) as session:
            while time.monotonic() < until:
                session.post("/v1/chat/completions", json={**body, "stream": count % 2 == 0}).raise_for_status()
                count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        return sum(pool.map(client, range(6)))


def finite(url: str, expression: str, began: float) -> int:
    """How many points of the range are numbers. An error of Prometheus fails the test with its words."""
    answer = httpx.get(
        f"{url}/api/v1/query_range", params={"query": expression, "start": began, "end": time.time(), "step": 1}
    ).json()
    assert answer["status"] == "success", (expression, answer)
    series: list[dict[str, Any]] = answer["data"]["result"]
    return sum(math.isfinite(float(value)) for each in series for _, value in each["values"])


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: apt-get install prometheus)")
def test_every_expression_of_the_board_finds_data(prometheus: str, served: str, smollm2: Bundle) -> None:
    board = os.environ.get("SKERRY_BOARD")
    expressions = of_board(Path(board)) if board else of_series()
    began = time.time()
    answered = keep_busy(served, time.monotonic() + SECONDS)
    time.sleep(2)
    filled = [e.replace("$model_name", smollm2.manifest.name).replace("$__rate_interval", "10s") for e in expressions]
    points = {expression: finite(prometheus, expression, began) for expression in filled}
    models = httpx.get(f"{prometheus}/api/v1/label/model_name/values").json()["data"]
    assert models == [smollm2.manifest.name], "what the board's own list of models is filled with"
    assert len(points) > 20 and [expression for expression, count in points.items() if not count] == []
    print(json.dumps({"seconds": SECONDS, "answered": answered, "points": fewest(points)}))


def fewest(points: dict[str, int]) -> dict[str, int]:
    """By series: the points of the expression that had the fewest."""
    found: dict[str, int] = {}
    for expression, count in points.items():
        for series in re.findall(r"vllm:\w+", expression):
            found[series] = min(count, found.get(series, count))
    return found
