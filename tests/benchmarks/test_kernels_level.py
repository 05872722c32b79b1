"""`skerry bench kernels`: ceilings, contests, and that a wrong kernel or a wrong peer has no figures."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest

from skerry.benchmarks.kernels import contest, matmul, paged_attention, read_sum, sample, torch_peer
from skerry.benchmarks.kernels.contest import Case, Peer, calls_of, compete, paired_ratio
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.cli import run
from skerry.core.errors import GateFailed, SkerryError
from skerry.kernels import _native
from skerry.kernels.pages import from_pages, to_pages

TORCH = importlib.util.find_spec("torch") is not None
QUICK = ["bench", "kernels", "--op", "sample", "--vocabulary", "512", "--repeats", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def short_shots(monkeypatch):
    monkeypatch.setattr(contest, "SHOT_SECONDS", 0.001)
    monkeypatch.setattr(contest, "PAUSE_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(read_sum, "sizes", lambda threads: {"read_sum": 1 << 20, "read_sum_memory": 1 << 21})
    monkeypatch.setattr("skerry.benchmarks.kernels.level.sizes", read_sum.sizes)


def setting(peers=(), torch=None, **fields) -> Setting:
    return Setting(1, 0, tuple(peers), torch, lambda line: None, **fields)


def steady(seconds: float):
    return lambda calls: seconds * calls


# Contests


def test_ratio_above_one_means_ours_is_faster():
    ratio, low, high = paired_ratio([1.0] * 8, [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.0])
    assert ratio == pytest.approx(2.0, rel=0.05) and 1 < low < ratio < high < 3
    assert paired_ratio([1.0] * 3, [2.0] * 3) == (pytest.approx(2.0), None, None)


def test_every_contestant_has_one_shot_a_repeat():
    case = Case("a", "A", steady(1e-6), (Peer("slow", "1", steady(3e-6)),), work=100, ceiling=steady(5e-7))
    case.ceiling_work = 100
    assert compete([case], 7, 0, lambda line: None) == []
    assert {who: len(values) for who, values in case.seconds.items()} == {"skerry": 7, "slow": 7, "ceiling": 7}
    (row,) = case.rows()
    assert (row["peer_name"], row["peer_version"], row["better"]) == ("slow", "1", "lower")
    assert row["ratio"] == pytest.approx(3) and row["low"] == pytest.approx(3) and row["ours"] == pytest.approx(1)
    assert case.share().median == pytest.approx(0.5) and case.figure().unit == "us"


def test_a_peer_that_breaks_off_keeps_what_it_reached():
    shots = 0

    def shot(calls: int) -> float:
        nonlocal shots
        shots += 1
        if shots > 8:
            raise SkerryError("time", "peer", "gone")
        return 1e-3 * calls

    case = Case("a", "A", steady(1e-3), (Peer("frail", "1", shot),))
    (note,) = compete([case], 20, 0, lambda line: None)
    assert "frail broke off" in note and "gone" in note
    assert len(case.seconds["skerry"]) == 20 and 0 < len(case.seconds["frail"]) < 20
    assert len(case.rows()) == 1


def test_ours_that_breaks_off_is_an_error():
    def shot(calls: int) -> float:
        raise SkerryError("run", "ours", "broken")

    with pytest.raises(SkerryError, match="broken"):
        compete([Case("a", "A", shot)], 2, 0, lambda line: None)


def test_calls_fill_a_shot(monkeypatch):
    monkeypatch.setattr(contest, "SHOT_SECONDS", 0.05)
    assert contest.calibrate(steady(1e-4)) == pytest.approx(500, rel=0.01)
    assert contest.calibrate(steady(10.0)) == 1
    assert contest.calibrate(steady(0.0)) == contest.MOST_CALLS


def test_a_shot_makes_its_calls():
    seen: list[int] = []
    assert calls_of(seen.append)(3) > 0 and seen == [0, 1, 2]


# Ceilings


def test_caches_of_this_machine(tmp_path):
    for index, (level, kind, size) in enumerate([(1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "2M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "index9").mkdir()
    assert read_sum.cache_bytes(tmp_path) == {1: 32 << 10, 2: 2 << 20, 3: read_sum.GUESS[3]}
    assert read_sum.cache_bytes(tmp_path / "absent") == read_sum.GUESS


@pytest.mark.parametrize("threads", [1, 3])
def test_the_reader_reads_everything(threads):
    array = read_sum.data(1 << 16)
    shot, close = read_sum.reader(array, threads)
    assert shot(5) > 0
    array[-1] = 7
    with pytest.raises(GateFailed, match="the sum is wrong"):
        shot(1)
    close()


# Correctness comes first


@pytest.fixture
def small_attention(monkeypatch):
    monkeypatch.setattr(paged_attention, "SHAPES", (paged_attention.Shape("h4x16", 4, 2, 16),))
    monkeypatch.setattr(paged_attention, "BATCHES", (1, 3))
    monkeypatch.setattr(paged_attention, "PREFILL", 20)
    monkeypatch.setattr(paged_attention, "cache_bytes", lambda: {2: 2048})


def test_attention_beside_onnxruntime(small_attention):
    own = setting(["onnxruntime"], contexts=(2, 33))
    cases = list(paged_attention.cases(own))
    names = ["decode_ctx2_b1", "decode_ctx2_b3", "decode_ctx33_b1", "decode_ctx33_b3", "prefill_20"]
    assert [case.name for case in cases] == [f"paged_attention_{name}_h4x16" for name in names]
    assert own.notes == [] and all([peer.name for peer in case.peers] == ["onnxruntime"] for case in cases)
    assert compete(cases, 1, 0, own.report) == []
    assert all(case.share().median > 0 for case in cases[:4]) and cases[4].share() is None
    assert all(len(case.rows()) == 1 for case in cases)
    own.close()


def test_a_wrong_peer_has_no_row(small_attention, monkeypatch):
    monkeypatch.setattr(paged_attention, "PEER_TOLERANCE", -1.0)
    own = setting(["onnxruntime"], contexts=(2,))
    cases = list(paged_attention.cases(own))
    assert not any(case.peers for case in cases) and len(own.notes) == len(cases)
    assert "no onnxruntime: check peer attention: off by" in own.notes[0]
    own.close()


@pytest.mark.parametrize("what", ["output", "cache"])
def test_wrong_attention_is_refused(small_attention, monkeypatch, what):
    def wrong(*arrays, **options):
        found = _native.paged_attention(*arrays, **options)
        if what == "output":
            found[0, 0] += 1e-4
        else:
            cache = from_pages(arrays[3], "f16.k16t", 2, 16)
            cache[arrays[10][0] // 16, 1, 0, arrays[10][0] % 16, 0] += 0.1
            arrays[3][:] = to_pages(cache, "f16.k16t")
        return found

    monkeypatch.setattr(paged_attention, "_native", SimpleNamespace(paged_attention=wrong))
    with pytest.raises(GateFailed, match="from the reference"):
        list(paged_attention.cases(setting(contexts=(33,))))


def test_wrong_sampling_has_no_figures(monkeypatch, capsys, tmp_path):
    def wrong(logits, rows, threads):
        token, *rest = _native.sample(logits, rows, threads)
        return (token + 1, *rest)

    monkeypatch.setattr(sample, "_native", SimpleNamespace(sample=wrong, kept=_native.kept))
    assert run([*QUICK, "--vs", "none", "--json", "--out", str(tmp_path)]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "gate_failed"
    kept = json.loads((tmp_path / "result.json").read_text())
    assert set(kept["figures"]) == {"read_sum", "read_sum_memory"} and "broke off" in kept["notes"][-1]


def test_wrong_kept_sets_are_refused(monkeypatch):
    wrong = SimpleNamespace(sample=_native.sample, kept=lambda *a: _native.kept(*a)[1:])
    monkeypatch.setattr(sample, "_native", wrong)
    with pytest.raises(GateFailed, match=r"rows \[0\] differ"):
        list(sample.cases(setting(vocabularies=(64,))))


def test_quantized_weights_are_what_they_stand_for():
    weights = np.random.default_rng(0).standard_normal((64, 96), np.float32)
    for bits, share in ((8, 0.01), (4, 0.15)):
        exact = matmul.quantized(weights, bits).dequantized()
        assert np.linalg.norm(exact - weights) / np.linalg.norm(weights) < share


def test_dense_products(monkeypatch):
    own = setting(dense_shapes=(matmul.Shape("tiny", 128, 64, (1, 3)),))
    cases = list(matmul.cases(own))
    assert [case.name for case in cases[1:]] == [f"matmul_int{b}_n128_k64_m{m}" for b in (8, 4) for m in (1, 3)]
    assert cases[0].name == "matmul_f32_1024" and cases[1].ceiling is not None and cases[2].ceiling is None
    own.close()
    monkeypatch.setattr(matmul, "TOLERANCE", 1e-6)
    with pytest.raises(GateFailed, match="relative error"):
        list(matmul.cases(own))
    own.close()


# torch, through its driver


@pytest.fixture(scope="module")
def torch():
    if not TORCH:
        pytest.skip("torch is not installed")
    with torch_peer.torch_peer(1) as peer:
        assert peer is not None
        yield peer


def test_torch_takes_part_in_everything(torch, small_attention, monkeypatch):
    shapes = (matmul.Shape("tiny", 128, 64, (1,)),)
    own = setting(["torch"], torch, contexts=(33,), vocabularies=(512,), dense_shapes=shapes)
    cases = [*paged_attention.cases(own), *sample.cases(own), *matmul.cases(own)]
    assert own.notes == []
    names = {case.name: [peer.name for peer in case.peers] for case in cases}
    assert names.pop("matmul_f32_1024") == []
    assert names.pop("sample_512_b1") == names.pop("sample_512_b8") == ["torch", "torch topk"]
    assert names.pop("matmul_int8_n128_k64_m1") == names.pop("matmul_int4_n128_k64_m1") == ["torch float32"]
    assert len(names) == 3 and all(peers == ["torch"] for peers in names.values())
    assert compete(cases, 1, 0, own.report) == []
    assert torch.version.split(".")[0].isdigit()
    own.close()


def test_what_torch_refuses_concerns_one_order(torch):
    x, w = np.ones((2, 3), np.float32), np.ones((4, 5), np.float32)
    with pytest.raises(SkerryError, match="mat1 and mat2"):
        torch.prepare("linear", {"x": x, "w": w})
    prepared = torch.prepare("linear", {"x": x, "w": np.ones((4, 3), np.float32)})
    assert prepared.output[0].tolist() == [[3.0] * 4] * 2 and prepared.shot(3) > 0
    prepared.forget()
    with pytest.raises(SkerryError, match="KeyError"):
        prepared.shot(1)


# The command


def test_one_json_document(capsys):
    assert run([*QUICK, "--vs", "none", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["schema"], document["level"]) == (2, "kernels")
    assert document["settings"]["threads"] == 1 and document["settings"]["ops"] == ["sample"]
    assert {"read_sum", "read_sum_memory", "sample_512_b1", "sample_512_b8"} == set(document["figures"])
    assert all(figure["median"] > 0 for figure in document["figures"].values()) and document["rows"] == []
    assert any("no interval" in note for note in document["notes"]) and "repeat 1 of 1" in err


def test_table(capsys):
    assert run([*QUICK, "--vs", "onnxruntime"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["level"] == "kernels" and any("sampling, V=512, b8" in line for line in lines)


def test_a_named_peer_must_be_there(monkeypatch, capsys):
    monkeypatch.setattr(torch_peer, "interpreter", lambda: None)
    assert run([*QUICK, "--vs", "torch", "--json"]) == 2
    assert "peers install transformers" in json.loads(capsys.readouterr().out)["error"]["hint"]
    assert run([*QUICK, "--json"]) == 0  # not named: it is missed, and that is said
    assert any("no torch" in note for note in json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.parametrize("words", [["--op", "softmax"], ["--repeats", "0"], ["--vs", "numpy"], ["--vocabulary", "1"]])
def test_usage(words, capsys):
    assert run(["bench", "kernels", *words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"
