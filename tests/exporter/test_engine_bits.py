"""What a quantized engine answers depends on nothing but the tokens: no bit of a request's logits changes with the
batch around it, with how its prompt is cut, with where its pages lie, or with the number of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from skerry.core.bundle import Bundle
from skerry.core.target import Target
from skerry.exporter.export import Options, build_engine, seal_engine
from skerry.exporter.kv_cache import KV_CACHES, set_layout
from skerry.exporter.subject import open_subject
from skerry.exporter.texts import open_texts
from skerry.kernels.program import NativeProgram
from skerry.kernels.runner import Row, Runner, pack_rows
from skerry.kernels.session import Session
from skerry.runtime.engine import run_to_completion
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.request import Request, SamplingParams
from skerry.runtime.scheduler import Limits

LENGTHS = (1, 37, 300, 17, 64)
PAGES = 100
# Windows on some layers, shorter than the longest sequence and no whole number of pages.
MORE = {
    "gemma2": {"sliding_window": 40},
    "gemma3": {"sliding_window": 90, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


@pytest.fixture(
    params=[
        "qwen2-int8-int8", "qwen2-int4-float16", "qwen2-int8-float32", "qwen3-int8-float16", "smollm3-int8-int8",
        "gemma2-int4-int8", "gemma3-int8-float16",
    ]
)  # fmt: skip
def engine(request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path: Path) -> Bundle:
    """FAMILY-WEIGHTS-PAGES."""
    family, precision, pages = request.param.split("-")
    model, options = make_model(family, peaked=True, pad_token_id=None, **MORE.get(family, {})), Options()
    subject = open_subject(model)
    built = build_engine(subject, Target("ort-cpu"), precision, tmp_path, options.progress)
    built = replace(built, groups=set_layout(tmp_path / "graph.onnx", built.groups, KV_CACHES[pages]))
    texts = open_texts(None, None)
    return seal_engine(subject, texts, built, Target("ort-cpu"), tmp_path, options, qualified=False)


def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).tolist() for length in LENGTHS]


def tables(runner: Runner, pages: list[int]) -> list[list[int]]:
    """A sequence's pages in each KV group: the second group, if there is one, has its own."""
    return [pages, [PAGES - 1 - page for page in pages]][: runner.groups]


def alone(runner: Runner, ids: list[int], pages: list[int], cuts: tuple[int, ...] = ()) -> np.ndarray:
    """Logits [len(ids), V] of one sequence, its prompt cut at `cuts`."""
    parts = []
    for first, last in zip((0, *cuts), (*cuts, len(ids))):
        row = Row(ids[first:last], first, tables(runner, pages), range(last - first))
        parts.append(runner.step(pack_rows([row], runner.page_size)))
    return np.concatenate(parts)


def pages_of(rng: np.random.Generator) -> list[list[int]]:
    order = iter(rng.permutation(PAGES).tolist())
    return [[next(order) for _ in range(-(-length // 16))] for length in LENGTHS]


def test_company_cuts_pages_and_threads_change_no_bit(engine: Bundle) -> None:
    rng, ids = np.random.default_rng(1), sequences()
    with Runner.open(engine, threads=1, pages=PAGES) as runner:
        wanted = [alone(runner, one, pages) for one, pages in zip(ids, pages_of(rng))]
        assert all(np.isfinite(one).all() and one.std() > 0.1 for one in wanted)
        for cuts in ((1, 2, 3), (16,), (5, 255, 256, 257), (200,)):
            within = tuple(cut for cut in cuts if cut < 300)
            np.testing.assert_array_equal(alone(runner, ids[2], pages_of(rng)[2], within), wanted[2])
    for threads in (1, 2, 3):
        with Runner.open(engine, threads=threads, pages=PAGES) as runner:
            for order in (rng.permutation(len(ids)).tolist() for _ in range(2)):
                pages = pages_of(rng)
                rows = [Row(ids[i], 0, tables(runner, pages[i]), range(len(ids[i]))) for i in order]
                found = runner.step(pack_rows(rows, runner.page_size))
                ends = np.cumsum([len(ids[i]) for i in order])
                for i, end in zip(order, ends.tolist()):
                    np.testing.assert_array_equal(found[end - len(ids[i]) : end], wanted[i])


def test_decoding_beside_a_prefill_gives_the_same_bits(engine: Bundle) -> None:
    """One token of one sequence while another's whole prompt is read: the row's tile differs, its numbers do not."""
    ids, pages = sequences(), pages_of(np.random.default_rng(2))
    with Runner.open(engine, threads=2, pages=PAGES) as runner:
        wanted = alone(runner, ids[4], pages[4])
        for at in range(40, 64):
            prefix = Row(ids[4][:at], 0, tables(runner, pages[4]), "none")
            runner.step(pack_rows([prefix], runner.page_size))
            beside = Row(ids[2], 0, tables(runner, pages[2]), "none")
            rows = [beside, Row(ids[4][at : at + 1], at, tables(runner, pages[4]))]
            np.testing.assert_array_equal(runner.step(pack_rows(rows, runner.page_size))[0], wanted[at])


def test_what_is_served_does_not_depend_on_the_cache_being_short(engine: Bundle) -> None:
    """Continuous batching over every KV group, with sequences that are put off and begun again, beyond the windows."""
    rng = np.random.default_rng(3)
    requests = [
        Request(tuple(rng.integers(0, 256, length).tolist()), 40, SamplingParams(temperature=9.0, seed=length))
        for length in (90, 7, 120, 33)
    ]
    texts = []
    for pages in (PAGES, 12):
        with Runner.open(engine, threads=2, pages=pages) as runner:
            texts.append(run_to_completion(OrtEngine(runner), requests, Limits(prefill_tokens=50)))
    assert texts[0] == texts[1]
    assert all(len(text) == 40 and len(set(text)) > 3 for text in texts[0])


def test_onnx_runtime_gives_the_same_logits(engine: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph means the same to a program and to a session. Norms and tanh that are ONNX Runtime's own sum in another
    order, and what is rounded to 8 bits after them may turn over."""
    ids = sequences()[2]
    with Runner.open(engine, threads=2, pages=PAGES) as runner:
        assert isinstance(runner._graph, NativeProgram)
        found = alone(runner, ids, list(range(20)), (100,))
    monkeypatch.setattr("skerry.kernels.runner.open_graph", open_session)
    with Runner.open(engine, threads=2, pages=PAGES) as runner:
        wanted = alone(runner, ids, list(range(20)), (100,))
    layers_normed_by_both = engine.manifest.model.family.startswith(("gemma", "qwen3"))
    most, mean = (0.15, 0.02) if layers_normed_by_both else (1e-5, 1e-6)
    assert np.abs(found - wanted).max() <= most * wanted.std()
    assert np.abs(found - wanted).mean() <= mean * wanted.std()


def test_onnx_runtime_gives_the_same_hidden_states(engine: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = sequences()[1]

    def states(runner: Runner) -> np.ndarray:
        hidden = np.full((2, runner.hidden_size), np.nan, np.float32)
        batch = pack_rows(
            [
                Row(ids, 0, tables(runner, [0, 1, 2]), [5, 36]),
                Row(ids[:9], 0, tables(runner, [3]), "none"),
            ],
            runner.page_size,
        )
        logits = runner.step(batch, hidden)
        np.testing.assert_array_equal(runner.step(batch), logits)
        none = pack_rows([Row(ids[:9], 0, tables(runner, [3]), "none")], runner.page_size)
        assert runner.step(none, np.empty((0, runner.hidden_size), np.float32)).shape[0] == 0
        return hidden

    with Runner.open(engine, threads=2, pages=PAGES) as runner:
        assert isinstance(runner._graph, NativeProgram) and runner.hidden_size == engine.manifest.model.hidden_size
        found = states(runner)
    monkeypatch.setattr("skerry.kernels.runner.open_graph", open_session)
    with Runner.open(engine, threads=2, pages=PAGES) as runner:
        wanted = states(runner)
    layers_normed_by_both = engine.manifest.model.family.startswith(("gemma", "qwen3"))
    assert np.abs(found - wanted).max() <= (0.15 if layers_normed_by_both else 1e-4) * wanted.std()


def open_session(bundle: Bundle, threads: int, *device: None) -> Session:
    return Session(bundle.file("graph.onnx"), bundle.short, threads)
