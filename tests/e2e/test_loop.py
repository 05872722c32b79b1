"""The whole loop with real processes and a tiny random-weight model, as `skerry demo --tiny` runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "skerry.core", "demo", "--tiny"]


def alive(workdir: Path) -> list[str]:
    """Command lines of processes that still name the demo's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(workdir) in line:
                found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.alone
@pytest.mark.timeout(400)
def test_the_loop_closes(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, "--dir", str(tmp_path), "--json"], capture_output=True, text=True, timeout=380)
    logs = {log.name: log.read_text(errors="replace")[-3000:] for log in (tmp_path / "logs").glob("*.log")}
    assert done.returncode == 0, (done.stderr[-4000:], logs)
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert all(result["checks"].values())
    assert [rollout["release"] for rollout in result["rollouts"]] == ["v1", "v2", "v4"]
    assert [rollout["state"] for rollout in result["rollouts"]] == ["SUCCEEDED", "SUCCEEDED", "ROLLED_BACK"]
    digests = {node["observed_digest"] for node in result["nodes"]}
    manifest = json.loads((tmp_path / "bundles/v2/manifest.json").read_bytes())
    assert digests == {manifest["engine_digest"]}
    assert "</svg>" in (tmp_path / "report.html").read_text()
    assert alive(tmp_path) == []


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.alone
def test_an_interrupted_demo_leaves_no_process_and_can_run_again(tmp_path: Path) -> None:
    for stop, code in ((signal.SIGINT, 130), (signal.SIGHUP, 130)):
        demo = subprocess.Popen([*DEMO, "--dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not any("data build" in line for line in alive(tmp_path)):
            assert time.monotonic() < deadline and demo.poll() is None, demo.communicate(timeout=5)
            time.sleep(0.1)
        demo.send_signal(stop)
        out, err = demo.communicate(timeout=30)
        assert demo.returncode == code, (out, err)
        deadline = time.monotonic() + 10
        while alive(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert alive(tmp_path) == []
