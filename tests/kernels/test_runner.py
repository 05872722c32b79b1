"""The step runner on a tiny graph: packing, aliasing, chunking, scoring, and graphs that do not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from skerry.core.bundle import open_bundle
from skerry.core.errors import IncompatibleError, InputError, UsageError
from skerry.kernels.pages import from_pages
from skerry.kernels.runner import Row, Runner, SampleParams, SampleRows, StepError, pack_rows

IDS = np.random.default_rng(0).integers(0, 96, 200).tolist()


@pytest.fixture(scope="module")
def runner(bundle):
    with Runner.open(bundle, threads=2, pages=40) as opened:
        yield opened


def logits_in_chunks(runner, ids, sizes, pages):
    parts, done = [], 0
    for size in sizes:
        row = Row(ids[done : done + size], done, [pages], range(size))
        parts.append(runner.step(pack_rows([row], runner.page_size)))
        done += size
    return np.concatenate(parts)


def test_properties(runner, bundle):
    assert (runner.page_size, runner.pages, runner.vocab_size, runner.max_context) == (16, 40, 96, 320)
    assert runner.kv_bytes == 2 * 40 * 2 * 2 * 16 * 8 * 4
    assert runner.manifest is bundle.manifest


def test_pages_are_updated_in_place(runner):
    array = runner._kv[0]
    before, address = array.copy(), array.ctypes.data
    runner.step(pack_rows([Row(IDS[:5], 0, [[7]])], 16))
    changed = np.flatnonzero((array != before).any(axis=1))
    assert changed.tolist() == [7] and array.ctypes.data == address
    tokens, untouched = (from_pages(part, "f32.k16t", 2, 8)[7, :, :, 5:] for part in (array, before))
    assert not (tokens != untouched).any()


def test_unbound_cache_is_copied_not_changed(bundle):
    """A plain session run, without IO binding, must leave the caller's array alone."""
    from skerry.kernels.session import Session

    session = Session(bundle.file("graph.onnx"), bundle.short, 1).session
    batch = pack_rows([Row(IDS[:5], 0, [[1]])], 16)
    kv = {f"kv.{layer}": np.zeros((2, 2 * 4 * 2 * 16 * 8), np.uint8) for layer in range(2)}
    feeds = {
        "input_ids": batch.input_ids, "positions": batch.positions, "query_start": batch.query_start,
        "context_len": batch.context_len, "plan": np.zeros(0, np.int32), "sample_rows": batch.sample_rows,
        "block_table.0": batch.block_tables[0], "slot.0": batch.slots[0], **kv,
    }  # fmt: skip
    logits, kv_out = session.run(["logits", "kv_out.0"], feeds)
    assert logits.shape == (1, 96) and kv_out[1].any() and not kv["kv.0"].any()


@pytest.mark.parametrize("sizes", [[1] * 100, [64, 36], [99, 1], [17, 31, 52]])
def test_chunked_prefill_and_decode_agree_with_one_prefill(runner, sizes):
    """The attention is equal bit for bit; the tiny graph's float MatMul is not promised to be."""
    whole = logits_in_chunks(runner, IDS[:100], [100], range(7))
    pieces = logits_in_chunks(runner, IDS[:100], sizes, list(range(20, 27)))
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5)


def test_mixed_batch_equals_each_alone(runner):
    rows = [
        Row(IDS[:40], 0, [[0, 1, 2]], [0, 39]), Row(IDS[50:51], 0, [[5]], "last"), Row(IDS[60:90], 0, [[6, 7]], "none"),
        Row(IDS[100:133], 0, [[9, 8, 10]], "last"),
    ]  # fmt: skip
    together = runner.step(pack_rows(rows, 16))
    assert together.shape == (4, 96)
    alone = np.concatenate([runner.step(pack_rows([row], 16)) for row in rows])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_a_step_that_wants_nothing(runner):
    assert runner.step(pack_rows([Row(IDS[:20], 0, [[0, 1]], "none")], 16)).shape == (0, 96)


def test_decode_loop_is_the_same_alone_and_in_a_busy_batch(runner):
    """Greedy and seeded rows draw the same tokens whatever shares their step."""

    def generate(neighbours: int) -> list[int]:
        ids, done, found = IDS[:9], 0, []
        for index in range(12):
            rows = [Row(IDS[20 + n : 30 + n], 0, [[20 + n]]) for n in range(neighbours)]
            rows.insert(neighbours // 2, Row(ids[done:], done, [[0, 1]]))
            logits = runner.step(pack_rows(rows, 16))
            params = [SampleParams(seed=99, token_index=index) for _ in rows]
            params[neighbours // 2] = SampleParams(temperature=0.9, top_p=0.9, seed=5, token_index=index)
            done = len(ids)
            found.append(int(runner.sample(logits, SampleRows.build(params)).token[neighbours // 2]))
            ids = ids + found[-1:]
        return found

    assert generate(0) == generate(3) == generate(7)


def test_score_matches_logits(runner):
    logits = runner.logits_for(IDS[:150]).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    entropy = -(np.exp(logp) * logp).sum(axis=1)
    sequences = [(IDS[:150], 1), (IDS[:60], 30), (IDS[:20], 19), (IDS[:33], 33), (IDS[:150], 149)]
    for budget in (7, 64, 512):
        for (ids, start), found in zip(sequences, runner.score(sequences, batch_tokens=budget)):
            at = np.arange(start, len(ids))
            np.testing.assert_allclose(found.logprob, logp[at - 1, np.array(ids)[at]], atol=2e-5)
            np.testing.assert_allclose(found.entropy, entropy[at - 1], atol=2e-5)


def test_score_waits_for_pages(bundle):
    with Runner.open(bundle, threads=1, pages=4) as small:
        assert small.max_context == 64
        assert [len(found.logprob) for found in small.score([(IDS[:64], 1)] * 5, batch_tokens=100)] == [63] * 5
        with pytest.raises(InputError, match="65 tokens with a context of 64"):
            small.score([(IDS[:65], 1)])
        with pytest.raises(InputError, match="start 0"):
            small.score([(IDS[:5], 0)])
        with pytest.raises(InputError, match="65 tokens"):
            small.logits_for(IDS[:65])


def test_pages_from_memory(bundle):
    per_page = 2 * 2 * 2 * 16 * 8 * 4
    with Runner.open(bundle.path, memory_bytes=10 * per_page + 5) as opened:
        assert opened.pages == 10 and opened.kv_bytes == 10 * per_page
    with Runner.open(bundle) as opened:
        assert opened.max_context == 320
    for arguments in ({"pages": 0}, {"memory_bytes": 10}, {"pages": 1, "memory_bytes": 1}, {"threads": 0, "pages": 1}):
        with pytest.raises(UsageError):
            Runner.open(bundle, **arguments)


def test_bad_steps_are_errors_and_the_runner_goes_on(runner):
    good = pack_rows([Row(IDS[:20], 0, [[0, 1]])], 16)
    expected = runner.step(good)
    for change, message in [
        ({"positions": good.positions + 320}, "position 320 of token 0 is outside the rotary tables of 320 rows"),
        ({"block_tables": [good.block_tables[0] + 40]}, "is page 40, the cache has 40 pages"),
        ({"block_tables": good.block_tables * 2, "slots": good.slots * 2}, "pages of 2 KV groups, not of 1"),
        ({"slots": [good.slots[0] + 10**6]}, "slot 1000000 of token 0"),
        ({"context_len": np.array([9999], np.int32)}, "needs 625 pages"),
        ({"input_ids": good.input_ids + 96}, "96"),
        ({"sample_rows": np.array([20], np.int32)}, "20"),
        ({"query_start": np.array([0, 10, 20], np.int32)}, "query_start"),
    ]:
        with pytest.raises(StepError, match=message):
            runner.step(replace(good, **change))
        np.testing.assert_array_equal(runner.step(good), expected)


def test_bad_sampling_parameters_are_errors(runner):
    logits = np.zeros((1, 96), np.float32)
    for params, message in [
        (SampleParams(temperature=-1), "temperature"), (SampleParams(target=96), "target 96"),
        (SampleParams(bias={96: 1.0}), "bias id 96"), (SampleParams(min_p=1.5), "min_p"),
        (SampleParams(mask=np.zeros(2, np.int32)), "mask of 2 words"), (SampleParams(top_k=-1), "top_k"),
    ]:  # fmt: skip
        with pytest.raises(StepError, match=message):
            runner.sample(logits, SampleRows.build([params]))
    with pytest.raises(StepError, match="temperature"):
        runner.sample(np.zeros((2, 96), np.float32), SampleRows.build([SampleParams()]))


def test_unknown_op(make_bundle, make_graph):
    with pytest.raises(IncompatibleError, match="PagedAttentionNext"):
        Runner.open(make_bundle(make_graph(op="PagedAttentionNext")), pages=4)


@pytest.mark.parametrize(
    ("version", "ops", "said"),
    [
        (3, ("skerry.PagedAttention:1",), "written for version 3 of skerry's ops, this version has 2"),
        (1, ("skerry.PagedAttention:2",), r"ops this runtime lacks: skerry\.PagedAttention:2"),
    ],
)
def test_later_versions_of_ops_are_refused_by_name(make_bundle, make_graph, version, ops, said):
    model = make_graph()
    next(item for item in model.opset_import if item.domain == "skerry").version = version
    with pytest.raises(IncompatibleError, match=said):
        Runner.open(make_bundle(model, ops=ops), pages=4)


def test_graph_from_garbage(make_bundle):
    sealed = make_bundle()
    sealed.file("graph.onnx").write_bytes(b"not a graph")
    with pytest.raises(IncompatibleError, match=r"graph\.onnx is refused: no ONNX graph: wire type 6"):
        Runner.open(sealed, pages=4)


@pytest.mark.parametrize(("name", "message"), [("logits", "logits is missing"), ("kv_out.1", "kv_out.1 is missing")])
def test_missing_outputs(make_bundle, make_graph, name, message):
    with pytest.raises(IncompatibleError, match=message):
        Runner.open(make_bundle(make_graph(drop=name)), pages=4)


def test_graph_unlike_its_manifest(make_bundle, make_graph):
    with pytest.raises(IncompatibleError, match=r"kv.0 has pages of 4096 bytes, 2048 by the manifest's f32.k16t"):
        Runner.open(make_bundle(make_graph(page=32)), pages=4)
    with pytest.raises(IncompatibleError, match="logits have 64 columns"):
        Runner.open(make_bundle(make_graph(vocab=64)), pages=4)
    with pytest.raises(IncompatibleError, match=r"kv\.1 is missing"):
        Runner.open(make_bundle(make_graph(layers=1)), pages=4)
    with pytest.raises(IncompatibleError, match=r"kv\.2 is unknown"):
        Runner.open(make_bundle(make_graph(layers=3)), pages=4)


def test_unknown_layout(make_bundle):
    sealed = make_bundle()
    group = replace(sealed.manifest.kv[0], layout="i4.k16t")
    other = replace(sealed, manifest=replace(sealed.manifest, kv=(group,)))
    with pytest.raises(IncompatibleError, match="KV layout i4"):
        Runner.open(other, pages=4)


def test_opens_a_bundle_by_path(bundle):
    with Runner.open(open_bundle(bundle.path), pages=4) as opened:
        assert opened.pages == 4


def test_packing():
    batch = pack_rows(
        [Row([5, 6], 15, [[3, 9], np.array([1, 2, 7], np.int32)]), Row([8], 0, [[4], [0]], "none", shared=1)], 16
    )
    assert batch.input_ids.tolist() == [5, 6, 8] and batch.positions.tolist() == [15, 16, 0]
    assert batch.query_start.tolist() == [0, 2, 3] and batch.context_len.tolist() == [17, 1]
    assert batch.block_tables[0].tolist() == [[3, 9], [4, -1]] and batch.block_tables[1].tolist() == [[1, 2], [0, -1]]
    assert batch.slots[0].tolist() == [63, 144, -1] and batch.slots[1].tolist() == [31, 32, -1]
    assert batch.sample_rows.tolist() == [1]
    assert {array.dtype for array in vars(batch).values() if isinstance(array, np.ndarray)} == {np.dtype(np.int32)}


def test_rows_that_cannot_be_packed():
    for rows, message in [
        ([], "no rows"), ([Row([], 0, [[0]])], "0 tokens"), ([Row([1], 16, [[0]])], "1 pages of 16 for 17 tokens"),
        ([Row([1], 0, [[0]], [1])], "sample indices"), ([Row([1], 0, [[0]]), Row([1], 0, [])], "row 1"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            pack_rows(rows, 16)
