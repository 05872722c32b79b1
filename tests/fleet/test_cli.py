"""The commands as an operator types them: --json, exit codes, hints."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from skerry.core import cli
from skerry.fleet import doctor


@pytest.fixture
def skerry(server, monkeypatch, capfd):
    """skerry("fleet node ls --json") -> (exit code, the JSON document or stdout, stderr)."""
    monkeypatch.setenv("SKERRY_FLEET_SERVER", server.url)
    monkeypatch.setenv("SKERRY_FLEET_TOKEN_FILE", str(server.directory / "admin.token"))

    def run(*words):
        code = cli.run([str(word) for word in words])
        out, err = capfd.readouterr()
        return code, json.loads(out) if "--json" in words else out, err

    return run


def test_the_main_road_by_command(skerry, server, join, bundle, tmp_path):
    code, made, _ = skerry("fleet", "token", "create", "--uses", 2, "--out", tmp_path / "t", "--json")
    assert code == 0 and made["token"] is None and (tmp_path / "t").stat().st_mode & 0o077 == 0
    made = bundle(b"one")
    publisher = server.directory / "publisher"
    code, document, _ = skerry(
        "fleet", "release", "publish", made.path, "--version", "v1", "--publisher", publisher, "--json"
    )
    assert code == 0 and document["bundles"]["ort-cpu"]["engine"] == made.manifest.engine_digest
    nodes = [join("a"), join("b")]
    for node in nodes:
        node.step()
    stop = threading.Event()

    def live():
        while not stop.is_set():
            for node in nodes:
                node.step()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        start = ("fleet", "rollout", "start", "v1", "--waves", "1,100%", "--soak-seconds", "0", "--soak-requests", "0")
        code, plan, _ = skerry(*start, "--dry-run", "--json")
        assert code == 0 and plan["dry_run"] and plan["policy"]["min_requests"] == 0
        code, done, progress = skerry(*start, "--watch", "--timeout", "20", "--json")
        assert code == 0 and done["state"] == "SUCCEEDED" and "SUCCEEDED" in progress
    finally:
        stop.set()
        thread.join()
    for words, expected in (
        (("fleet", "node", "ls"), "online"),
        (("fleet", "node", "show", "a"), "v1"),
        (("fleet", "release", "ls"), "ort-cpu"),
        (("fleet", "rollout", "status"), "SUCCEEDED"),
        (("fleet", "rollout", "status", done["id"]), "wave 2 (100%)"),
        (("fleet", "rollout", "history"), "JUDGE"),
        (("fleet", "audit"), "the chain is intact"),
        (("drift", "status"), "no drift"),
        (("fleet", "retrain", "ls"), "SOURCE"),
        (("fleet", "source", "ls"), "TOKENS"),
    ):
        code, text, _ = skerry(*words)
        assert code == 0 and expected in text, words
        code, document, _ = skerry(*words, "--json")
        assert code == 0 and isinstance(document, dict)
    assert skerry("fleet", "node", "revoke", "a")[0] == 0


def test_exit_codes(skerry, server, join, bundle, tmp_path, monkeypatch):
    server.publish([bundle(b"one")], "v1")
    node = join("a")
    node.step()
    assert skerry("fleet", "rollout", "start", "v9")[0] == 1
    assert skerry("fleet", "rollout", "status")[0] == 0
    assert skerry("fleet", "rollout", "status", "--watch")[0] == 1
    assert skerry("fleet", "rollout", "start")[0] == 2
    # Nobody polls, so it cannot fill: watching ends in a timeout, and aborting under a watch in 3.
    assert skerry("fleet", "rollout", "start", "v1", "--watch", "--timeout", "0.2")[0] == 5
    assert skerry("fleet", "rollout", "abort", "--watch")[0] == 3
    assert skerry("fleet", "rollout", "resume")[0] == 1
    code, _, err = skerry("fleet", "rollout", "start", "v1", "--waves", "half")
    assert code == 2 and "neither a count nor a percentage" in err
    failing = bundle(b"bad", passed=False)
    publisher = server.directory / "publisher"
    code, document, _ = skerry(
        "fleet", "release", "publish", failing.path, "--version", "v2", "--publisher", publisher, "--json"
    )
    assert code == 3 and document["error"]["code"] == "gate_failed"
    hidden = Path(__file__).parents[1] / "fixtures" / "bundles" / "hidden-ops"
    code, _, err = skerry("fleet", "release", "publish", hidden, "--version", "v3", "--publisher", publisher)
    assert code == 1 and "acme.Backdoor" in err
    (tmp_path / "wrong").write_text("wrong")
    code, document, err = skerry("fleet", "node", "ls", "--token-file", tmp_path / "wrong", "--json")
    assert code == 4 and document["error"]["code"] == "unauthorized" and "Try:" in err
    monkeypatch.delenv("SKERRY_FLEET_TOKEN_FILE")
    assert skerry("fleet", "node", "ls")[0] == 4


def test_init_and_serve_refuse_what_cannot_work(skerry, server, tmp_path, free_port):
    code, made, _ = skerry("fleet", "init", "--dir", tmp_path / "d", "--json")
    assert code == 0 and made["server"].endswith("server")
    assert skerry("fleet", "init", "--dir", tmp_path / "d")[0] == 1
    assert "no control plane" in skerry("fleet", "serve", "--dir", tmp_path)[2]
    assert "another process" in skerry("fleet", "serve", "--dir", server.directory / "server")[2]
    import socket

    with socket.create_server(("127.0.0.1", free_port)):
        code, _, err = skerry("fleet", "serve", "--dir", made["server"], "--port", free_port, "--no-zeroconf")
        assert code == 1 and "the port is in use" in err
    (tmp_path / "skerry.toml").write_text("[fleet]\nprot = 1\n")
    code, _, err = skerry("fleet", "serve", "--dir", made["server"], "--config", tmp_path / "skerry.toml")
    assert code == 2 and "did you mean port?" in err
    assert skerry("fleet", "serve", "--dir", made["server"], "--poll-seconds", "0")[0] == 2


def test_source_files_with_and_without_a_tokenizer(skerry, tmp_path, source_sketch):
    (tmp_path / "full").write_text(json.dumps({"sketch": source_sketch(1), "tokenizer_digest": "a" * 64}))
    (tmp_path / "bare").write_text(json.dumps(source_sketch(1)))
    assert skerry("fleet", "source", "add", "one", "--sketch", tmp_path / "full")[0] == 0
    assert skerry("fleet", "source", "add", "two", "--sketch", tmp_path / "bare")[0] == 1
    assert (
        skerry("fleet", "source", "add", "two", "--sketch", tmp_path / "bare", "--tokenizer-digest", "a" * 64)[0] == 0
    )
    _, listed, _ = skerry("fleet", "source", "ls", "--json")
    assert [one["name"] for one in listed["data_sources"]] == ["one", "two"]


def test_doctor_finds_everything_here():
    assert all(check.ok is not False for check in doctor.checks())
