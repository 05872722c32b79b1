"""What is measured is what the labels say: the workload's arithmetic and the answers, never the time it took."""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import pytest

from skerry.benchmarks.engine import Session, check_golden, measure, measure_once, peer_case, quality
from skerry.benchmarks.engine_bytes import measure_share, token_bytes
from skerry.benchmarks.engine_steps import Stream, decode, greedy, in_steps, prefill
from skerry.benchmarks.engine_workload import Workload, describe
from skerry.benchmarks.memory import gpu_memory
from skerry.benchmarks.page_cache import cached_pages, drop_page_cache
from skerry.core.errors import BundleError, GateFailed, SkerryError, UsageError
from skerry.core.files import write_json
from skerry.kernels.blocks import BlockFormat, packed_bytes
from skerry.kernels.runner import Runner

OPTIONAL = {"open_cold", "pss", "gpu_memory", "memory_over"}  # where the system can tell
OPTIONAL |= {"read_sum", "decode_bytes_share"}  # the tiny graph keeps its rotary tables beside its weights
SMALL = Workload(contexts=(48,), sequences=(3,), prefills=(40,), chunk=16, decode=4, prompt=21, output=5, bind_calls=3)


@pytest.fixture(scope="module")
def runner(bundle):
    with Runner.open(bundle, threads=1, pages=64) as opened:
        yield opened


def test_every_figure_has_a_positive_value_a_repeat(bundle):
    lines: list[str] = []
    found = measure(bundle, SMALL, 3, (1,), lines.append)
    assert found["check"] == {"golden": "absent"} and found["workload"]["contexts"] == (48,)
    assert describe(SMALL).keys() - OPTIONAL <= found["figures"].keys() <= describe(SMALL).keys()
    for name, figure in found["figures"].items():
        assert (len(figure.values) == 3 or name in OPTIONAL) and all(value > 0 for value in figure.values)
    assert len(lines) == 4


@pytest.mark.parametrize("context", [1, 16, 40, 300])
def test_any_context_beside_the_prefill(bundle, context):
    found = measure_once(bundle, Workload(contexts=(context,), sequences=(1,), prefills=(40,), decode=4), 1).keys()
    assert describe(SMALL).keys() - OPTIONAL <= found <= describe(SMALL).keys()


def test_a_long_prefill_is_cut_and_a_long_context_is_refused(bundle):
    assert Workload(contexts=(64,)).fit(bundle).prefill == 320
    with pytest.raises(UsageError, match=r"544 tokens .* takes 320") as caught:
        Workload().fit(bundle)
    assert "288" in caught.value.hint
    with pytest.raises(UsageError, match="takes 100") as caught:
        Workload(contexts=(8,)).fit(_with_context(bundle, 100))
    assert "longer context" in caught.value.hint


def test_several_contexts_and_batches(bundle):
    """The first of each keeps the plain names; a page is used by one sequence only, however the cases are ordered."""
    load = Workload(
        contexts=(16, 40), sequences=(2, 3), prefills=(40,), chunk=16, decode=4, prompt=21, output=5, bind_calls=2
    )
    lines: list[str] = []
    found = measure(bundle, load, 2, (1,), lines.append, seed=5)["figures"]
    assert {"decode_context", "decode_context_40", "batch_output", "batch_output_3", "batch_decode_3", "mixed",
            "mixed_3"} <= found.keys()  # fmt: skip
    assert found["decode_context_40"].label.endswith("context 40") and len(found["mixed_3"].values) == 2
    long, short = load.streams(16)
    assert len(short) == 3 and len(long.pages) * 16 >= 44


@pytest.mark.parametrize("first", ["mixed", "decode_context", "batch_output", "bind", "prefill"])
def test_a_case_does_not_need_the_one_before(bundle, first):
    cases = {case.name: case for case in SMALL.cases()}
    with Session(bundle, SMALL, 1) as session:
        found = session.run(cases[first])
        assert all(value > 0 for value in found.values())
        session.run(cases["decode_context"])
        assert session.long.length == 48 + 4
        session.run(cases["batch_output"])
        assert [stream.length for stream in session.short] == [21 + 4] * 3


def test_peers_get_the_same_ids(bundle, runner):
    cases = {case.name: case for case in SMALL.cases()}
    with Session(bundle, SMALL, 1) as session:
        order = peer_case(runner, SMALL, cases["decode_context"])
        assert order["prompts"] == [session._ids[:48]] and order["decode"] == 4
    assert peer_case(runner, SMALL, cases["decode_empty"])["prompts"] == [[]]
    batch = peer_case(runner, SMALL, cases["batch_output"])
    assert [len(prompt) for prompt in batch["prompts"]] == [21] * 3 and batch["output"] == 5


class Beside:
    """Peers' side of a measurement, as engine.py sees it: what was asked, in order."""

    def __init__(self) -> None:
        self.sides, self.asked, self.tuned = ["a", "b"], [], {}

    def tune(self, cases, suffix):
        self.tuned |= cases

    def sides_of(self, suffix):
        return self.sides

    def values(self):
        return {}

    def measure(self, side, repeat, name, case):
        assert case is self.tuned[name]
        self.asked.append((repeat, name, side))
        if (repeat, side) == (1, "b") and side in self.sides:
            self.sides.remove(side)  # as Versus does with one that fails

    def measure_memory(self, repeat):
        self.asked.append((repeat, "memory", ""))

    def rows(self, described, ours):
        return [{"measure": name, "repeats": sorted(ours[name])} for name in described if ours[name]]


def test_every_side_is_measured_in_every_case_in_a_drawn_order(bundle):
    runs = []
    for seed in (1, 1, 2):
        beside = Beside()
        found = measure(bundle, SMALL, 3, (1,), lambda line: None, beside, seed)
        runs.append(beside.asked)
        names = {"prefill", "decode_empty", "decode_context", "batch_output"}
        assert beside.tuned.keys() == names
        for repeat in (0, 2):
            of_a = [name for number, name, side in beside.asked if number == repeat and side == "a"]
            assert sorted(of_a) == sorted(names)
        assert {name for number, name, side in beside.asked if (number, side) == (0, "b")} == names
        assert not [side for number, _, side in beside.asked if (number, side) == (2, "b")]  # it failed before
        assert {"measure": "prefill", "repeats": [0, 1, 2]} in found["rows"]
    assert runs[0] == runs[1] != runs[2]


def test_forgotten_files_are_not_cached(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (1 << 20))
    if not drop_page_cache([path]):
        pytest.skip("this file system keeps what it has in memory, or cannot tell")
    assert cached_pages(path) == 0
    path.read_bytes()
    assert cached_pages(path) == (1 << 20) // mmap.PAGESIZE
    assert not drop_page_cache([path, tmp_path / "absent"])


def test_decoding_is_held_against_a_sum_of_as_many_bytes():
    """Half of the passes before, half after: what the machine does in between falls on both."""
    asked = []

    def decode() -> float:
        asked.append("decode")
        return 50.0

    found = measure_share(decode, 4, 1 << 20, 1)
    assert asked == ["decode"] and found["read_sum"] > 0
    assert found["decode_bytes_share"] == pytest.approx(50.0 * (1 << 20) / (found["read_sum"] * 1e9))


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_the_matrices_and_no_tables(bundle, tied):
    """A file of so many bytes beyond the tables, and beyond the embedding where that is not the head."""
    spec = replace(bundle.manifest.model, tied_embeddings=tied)
    tables = bundle.manifest.max_context * spec.head_size * 4
    embedding = 0 if tied else packed_bytes(BlockFormat.Q8_0, spec.vocab_size, spec.hidden_size)
    entries = tuple(
        replace(entry, size=tables + embedding + 5000) if entry.name == "weights.bin" else entry
        for entry in bundle.manifest.files
    )
    manifest = replace(bundle.manifest, model=spec, files=entries, precision="stored")
    assert token_bytes(replace(bundle, manifest=manifest)) == 5000
    assert token_bytes(bundle) is None  # its tables lie in the graph


def _with_context(bundle, limit):
    return replace(bundle, manifest=replace(bundle.manifest, max_context=limit))


def test_streams_share_no_page():
    long, short = SMALL.streams(16)
    pages = [*long.pages, *(page for stream in short for page in stream.pages)]
    assert sorted(pages) == list(range(SMALL.pages(16)))
    assert len(long.pages) * 16 >= 52 and all(len(stream.pages) * 16 >= 26 for stream in short)


@pytest.mark.parametrize("lengths", [[1], [16], [17], [21, 21, 21], [5, 40, 1, 3], [110] * 8])
def test_steps_cover_every_token_once_within_the_chunk(lengths):
    steps = list(in_steps(lengths, 16))
    assert all(sum(last - first for _, first, last in step) == 16 for step in steps[:-1])
    covered = [(index, at) for step in steps for index, first, last in step for at in range(first, last)]
    assert covered == [(index, at) for index, length in enumerate(lengths) for at in range(length)]


def test_batched_sequences_say_what_each_says_alone(runner):
    """So the batch decodes at the positions and from the pages that it claims."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 96, 21).tolist() for _ in range(3)]
    _, streams = SMALL.streams(16)
    first = prefill(runner, streams, prompts, 16)
    together = decode(runner, streams, first, 4)
    assert [stream.length for stream in streams] == [25] * 3
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(runner.logits_for(ids)[-1].argmax()))
        assert (ids[21], ids[-1]) == (first[index], together[index])


def test_context_is_what_decoding_attends_to(runner):
    ids = np.random.default_rng(4).integers(0, 96, 40).tolist()
    stream = Stream(range(8))
    prefill(runner, [stream], [ids], 16)
    stream.length = 30  # as the benchmark does: the pages hold more than the sequence is said to
    (token,) = decode(runner, [stream], [7], 1)
    assert token == int(runner.logits_for([*ids[:30], 7])[-1].argmax())


def test_golden_prompts_are_checked_first(golden_bundle):
    with Runner.open(golden_bundle(0.01), threads=1) as opened:
        found = check_golden(opened)
    assert found["golden"] == "passed" and found["mean_error"] == pytest.approx(0.01, abs=1e-3)


def test_a_wrong_engine_has_no_figures(golden_bundle):
    with pytest.raises(GateFailed, match=r"off by 0\.5.*margin 0\.1"):
        measure(golden_bundle(0.5), SMALL, 1, (1,), lambda line: None)


@pytest.mark.parametrize("document", [{"rows": []}, {"rows": [{"ids": [1, 2]}]}, [1]])
def test_malformed_golden_prompts(golden_bundle, document):
    with Runner.open(golden_bundle(document=document), threads=1) as opened, pytest.raises(BundleError, match="golden"):
        check_golden(opened)


def test_quality_stands_beside_the_speed(tmp_path, make_bundle, bundle):
    """As the exporter measured it; absent where it did not, refused where it is damaged."""
    write_json(tmp_path / "parity.json", {"ppl_ratio": 1.004, "kl": 0.003, "top1": 0.96})
    measured = make_bundle(tmp_path)
    found = measure(measured, SMALL, 1, (1,), lambda line: None)["figures"]
    assert {name: found[f"quality_{name}"].median for name in ("ppl_ratio", "kl", "top1")} == {
        "ppl_ratio": 1.004, "kl": 0.003, "top1": 96.0,
    }  # fmt: skip
    assert quality(bundle) == {}
    write_json(measured.path / "parity.json", {"kl": "small"})
    with pytest.raises(BundleError, match=r"parity\.json"):
        quality(measured)


def test_logits_that_are_not_numbers(runner):
    with pytest.raises(SkerryError, match="not numbers"):
        greedy(runner, np.full((2, 96), np.nan, np.float32))


@pytest.mark.parametrize(
    ("printed", "code", "found"),
    [("7, 100\n9, 1\n7, 20", 0, 120 << 20), ("9, 100", 0, None), ("no devices", 0, None), ("7, 100", 9, None)],
)
def test_gpu_memory_is_what_the_driver_says_or_absent(tmp_path, monkeypatch, printed, code, found):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{printed}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_memory(7) == found


def test_no_gpu_is_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory(7) is None
