"""The `skerry node` commands as processes: exit codes, messages, signals, orphans."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SKERRY = (sys.executable, "-c", "from skerry.core.cli import main; main()")


def skerry(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SKERRY, *map(str, words)], capture_output=True, text=True, timeout=30)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("good-token\n")
    return path


def test_join_keeps_what_it_was_told(control: Any, token: Path, tmp_path: Path) -> None:
    directory = tmp_path / "n"
    done = skerry("node", "join", control.url, "--token-file", token, "--dir", directory, "--name", "n",
                  "--label", "site=attic", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["node"] == "n-1"
    assert (directory / "node.pem").stat().st_mode & 0o777 == 0o600
    assert (directory / "root.json").read_bytes() == control.repository.root
    again = skerry("node", "join", control.url, "--token-file", token, "--dir", directory)
    assert again.returncode == 1 and "already joined" in again.stderr
    offline = skerry("node", "status", "--dir", directory, "--json")
    assert offline.returncode == 1 and json.loads(offline.stdout)["running"] is False


def test_a_wrong_token_is_exit_4(control: Any, token: Path, tmp_path: Path) -> None:
    token.write_text("bad")
    done = skerry("node", "join", control.url, "--token-file", token, "--dir", tmp_path / "n", "--json")
    assert done.returncode == 4 and "unknown token" in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "unauthorized"
    assert not (tmp_path / "n" / "node.json").exists()
    token.write_text("")
    assert skerry("node", "join", control.url, "--token-file", token, "--dir", tmp_path / "n").returncode == 4


def test_bad_arguments(control: Any, token: Path, tmp_path: Path) -> None:
    join = ("node", "join", "--token-file", token, "--dir", tmp_path / "n")
    assert skerry(*join).returncode == 2
    assert skerry(*join, "ftp://x").returncode == 2
    assert skerry(*join, control.url, "--label", "nonsense").returncode == 2
    (tmp_path / "root").write_text("{}")
    refused = skerry(*join, control.url, "--root", tmp_path / "root")
    assert refused.returncode == 1 and "root" in refused.stderr
    control.mode = "garbage"
    assert "control plane" in skerry(*join, control.url).stderr
    nobody = skerry("node", "run", "--dir", tmp_path / "nobody")
    assert nobody.returncode == 1 and "has not joined" in nobody.stderr


def test_a_port_in_use_is_exit_1(make_node: Any) -> None:
    node = make_node()
    with socket.create_server(("127.0.0.1", node.port)):
        assert node.start().wait_exit() == 1
    assert "the port is in use" in node.log.read_text() and "--port" in node.log.read_text()


def test_an_unknown_setting_is_exit_2(make_node: Any, tmp_path: Path) -> None:
    node = make_node()
    (tmp_path / "skerry.toml").write_text("[node]\nprot = 8080\n")
    done = skerry("node", "run", "--dir", node.directory, "--config", tmp_path / "skerry.toml")
    assert done.returncode == 2 and "did you mean port" in done.stderr
    (tmp_path / "skerry.toml").write_text("[node]\nthreads = -1\n")
    done = skerry("node", "run", "--dir", node.directory, "--config", tmp_path / "skerry.toml")
    assert done.returncode == 2 and "threads: -1 must lie between 0 and 1024" in done.stderr


def test_an_operator_lifts_a_quarantine(make_node: Any) -> None:
    from skerry.runtime.slots import Quarantine

    directory = make_node().directory
    Quarantine(directory).add("ab" * 32, "v2", "crashed", 1.0)
    assert skerry("node", "lift", "ab", "--dir", directory).returncode == 1
    assert skerry("node", "lift", "ffffffff", "--dir", directory).returncode == 1
    done = skerry("node", "lift", "abababab", "--dir", directory, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["lifted"] == "ab" * 32
    assert not Quarantine(directory).digests


@pytest.mark.slow
@pytest.mark.e2e
def test_one_agent_per_directory_and_a_clean_stop(
    control: Any, make_bundle: Any, make_node: Any, install_bundle: Any, until: Any
) -> None:
    node = make_node()
    bundle = make_bundle("v1")
    install_bundle(node.directory, bundle)
    control.want(control.publish(bundle))
    node.start()
    pid = until(lambda: node.ask()[1].get("pid"))
    second = skerry("node", "run", "--dir", node.directory, "--port", 0, "--admin-port", 0)
    assert second.returncode == 1 and "another agent" in second.stderr
    status = skerry("node", "status", "--dir", node.directory)
    assert status.returncode == 0 and "serving     v1" in status.stdout
    assert node.stop() == 0
    assert not Path(f"/proc/{pid}").exists() and node.ask()[0] == 0
    until(lambda: "agent.stopped" in control.kinds())


@pytest.mark.faults("SIGKILL of the agent")
@pytest.mark.slow
@pytest.mark.e2e
def test_a_killed_agents_worker_neither_lives_on_nor_blocks_the_port(
    control: Any, make_bundle: Any, make_node: Any, install_bundle: Any, until: Any
) -> None:
    node = make_node()
    bundle = make_bundle("v1")
    install_bundle(node.directory, bundle)
    control.want(control.publish(bundle))
    node.start()
    orphan = until(lambda: node.ask()[1].get("pid"))
    node.kill()
    node.start()
    until(lambda: node.ask()[1].get("pid") not in (None, orphan))
    until(lambda: not Path(f"/proc/{orphan}").exists())
    assert node.admin()["boot"] == 2 and control.replays == 0
