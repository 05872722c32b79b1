"""Sample on the CPU against its definition: kept sets exactly, draws, scores, odd rows."""

from __future__ import annotations

import numpy as np
import pytest

from skerry.kernels import _native, reference
from skerry.kernels.sampling import SampleParams, SampleRows

VOCABULARIES = [1, 2, 31, 32, 33, 1000, 49152]


def rows_of(*params: SampleParams, top_n: int = 0) -> SampleRows:
    return SampleRows.build(params, top_n)


def compare(logits: np.ndarray, rows: SampleRows) -> None:
    """Kept sets and tokens exactly, probabilities within float32."""
    for row in range(len(rows)):
        ids, _ = reference.kept(logits[row], rows, row)
        np.testing.assert_array_equal(_native.kept(logits, rows, row), ids, err_msg=f"row {row}")
    expected = reference.sample(logits, rows)
    token, logprob, entropy, top_ids, top_logprobs = _native.sample(logits, rows, 2)
    np.testing.assert_array_equal(token, expected.token)
    np.testing.assert_allclose(logprob, expected.logprob, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(entropy, expected.entropy, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(top_ids, expected.top_ids)
    np.testing.assert_allclose(top_logprobs, expected.top_logprobs, rtol=1e-6, atol=1e-6)


def random_params(rng: np.random.Generator, vocabulary: int) -> SampleParams:
    def ids(most: int) -> list[int]:
        return rng.choice(vocabulary, min(vocabulary, int(rng.integers(0, most))), replace=False).tolist()

    mask = rng.integers(-(2**31), 2**31, -(-vocabulary // 32)).astype(np.int32)
    return SampleParams(
        temperature=float(rng.choice([0.0, 0.3, 0.7, 1.0, 1.7, 50.0])),
        top_k=int(rng.choice([0, 0, 1, 2, 40, vocabulary, vocabulary + 5])),
        top_p=float(rng.choice([0.0, 1e-8, 0.1, 0.5, 0.9, 0.999, 1.0, 1.0])),
        min_p=float(rng.choice([0.0, 0.0, 0.05, 0.5, 1.0])),
        repetition=float(rng.choice([1.0, 1.1, 0.8])), frequency=float(rng.choice([0.0, 0.4, -0.2])),
        presence=float(rng.choice([0.0, 0.6])), seed=int(rng.integers(0, 2**63)), token_index=int(rng.integers(0, 99)),
        history={i: int(rng.integers(0, 4)) for i in ids(60)}, bias={i: float(rng.normal() * 3) for i in ids(20)},
        mask=mask if rng.random() < 0.3 else None, target=int(rng.choice([-1, -1, -1, vocabulary - 1])),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["smooth", "ties", "two values", "peaked"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_random_rows(vocabulary, kind):
    rng = np.random.default_rng(vocabulary)
    count = 4 if vocabulary > 10_000 else 24
    logits = rng.normal(size=(count, vocabulary)).astype(np.float32) * 3
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "two values":
        logits = np.sign(logits)
    elif kind == "peaked":
        logits *= 20
    compare(logits, rows_of(*(random_params(rng, vocabulary) for _ in range(count)), top_n=5))


@pytest.mark.parametrize("top_p", [0.0, 1e-8, 0.25, 0.5, 0.75, 0.999999, 1.0])
@pytest.mark.parametrize("vocabulary", [1, 32, 33, 4096])
def test_all_tied(vocabulary, top_p):
    """A boundary inside a tie is decided by the index: ceil(p * V) of the first ids."""
    logits = np.full((1, vocabulary), 2.5, np.float32)
    rows = rows_of(SampleParams(top_p=top_p))
    kept = _native.kept(logits, rows, 0)
    exact = float(np.float32(top_p)) * vocabulary
    assert kept.tolist() == list(range(max(1, int(np.ceil(exact)))))
    compare(logits, rows)


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 32, 33, 34])
def test_top_k_within_ties(top_k):
    logits = np.repeat(np.float32([3, 5, 3]), 11)[None]
    order = [*range(11, 22), *range(11), *range(22, 33)]
    kept = _native.kept(logits, rows_of(SampleParams(top_k=top_k)), 0)
    assert kept.tolist() == sorted(order[: top_k or 33])


def test_signed_zeros_tie():
    logits = np.float32([[-0.0, 0.0, -0.0, -1.0]])
    for top_k in (1, 2, 3):
        assert _native.kept(logits, rows_of(SampleParams(top_k=top_k)), 0).tolist() == list(range(top_k))
    compare(logits, rows_of(SampleParams(top_k=2), top_n=4))


def test_top_p_applies_to_what_top_k_left():
    logits = np.log(np.float32([[0.4, 0.3, 0.2, 0.1]]))
    assert _native.kept(logits, rows_of(SampleParams(top_k=2, top_p=0.57)), 0).tolist() == [0]  # 4/7 > 0.57
    assert _native.kept(logits, rows_of(SampleParams(top_k=2, top_p=0.58)), 0).tolist() == [0, 1]
    assert _native.kept(logits, rows_of(SampleParams(top_p=0.58)), 0).tolist() == [0, 1]
    assert _native.kept(logits, rows_of(SampleParams(min_p=0.49)), 0).tolist() == [0, 1, 2]


def test_penalties_by_hand():
    logits = np.float32([[4.0, -4.0, 1.0, 0.5]])
    rows = rows_of(
        SampleParams(repetition=2.0, frequency=0.5, presence=0.25, history={0: 2, 1: 0, 2: 1}, bias={3: 7.0})
    )
    found = reference.adjusted(logits[0], rows, 0)
    assert found.tolist() == [4 / 2 - 2 * 0.5 - 0.25, -4 * 2, 1 / 2 - 0.5 - 0.25, 7.5]
    compare(logits, rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution(temperature):
    vocabulary = 50
    normal = np.random.default_rng(0).normal(size=vocabulary)
    nan, inf, nothing = normal.copy(), normal.copy(), np.full(vocabulary, -np.inf)
    nan[7], inf[9] = np.nan, np.inf
    one_hot = nothing.copy()
    one_hot[33] = 4.0
    logits = np.float32([nan, inf, nothing, np.full(vocabulary, np.nan), one_hot, normal])
    rows = rows_of(*[SampleParams(temperature=temperature, top_p=0.9, top_k=3)] * 6, top_n=3)
    token, logprob, entropy, top_ids, top_logprobs = _native.sample(logits, rows)
    assert token[:4].tolist() == [-1] * 4 and np.isnan([logprob[:4], entropy[:4]]).all()
    assert (top_ids[:4] == -1).all() and np.isnan(top_logprobs[:4]).all()
    assert token[4] == 33 and logprob[4] == 0 and entropy[4] < 1e-30
    assert top_ids[4, 0] == 33 and top_logprobs[4].tolist() == [0, -np.inf, -np.inf]
    assert token[5] >= 0 and np.isfinite([logprob[5], entropy[5]]).all()
    compare(logits, rows)


def test_a_target_in_a_broken_row_is_not_scored():
    logits = np.float32([[np.nan, 1.0]])
    assert _native.sample(logits, SampleRows.score([1]))[0][0] == -1


def test_everything_masked():
    logits = np.random.default_rng(0).normal(size=(2, 70)).astype(np.float32)
    none, last = np.zeros(3, np.int32), np.zeros(3, np.int32)
    last[2] = 1 << 5
    for temperature in (0.0, 1.0):
        rows = rows_of(
            SampleParams(temperature=temperature, mask=none), SampleParams(temperature=temperature, mask=last)
        )
        token, logprob, entropy, *_ = _native.sample(logits, rows)
        assert token.tolist() == [-1, 69] and np.isnan(logprob[0]) and np.isfinite(entropy).all()
        compare(logits, rows)


def test_infinite_biases():
    logits = np.zeros((3, 8), np.float32)
    rows = rows_of(
        SampleParams(bias={2: float("-inf")}),
        SampleParams(bias={3: float("inf")}),
        SampleParams(bias={3: float("nan")}),
    )
    assert _native.sample(logits, rows)[0].tolist()[1:] == [-1, -1]
    compare(logits, rows)


def test_greedy_is_the_lowest_of_the_largest():
    logits = np.float32([[1, 3, 3, 2], [5, 5, 5, 5]])
    rows = rows_of(SampleParams(temperature=0.0, seed=1), SampleParams(temperature=1e-6, top_p=0.2, seed=2))
    assert _native.sample(logits, rows)[0].tolist() == [1, 0]


def test_extreme_temperatures_and_logits():
    rng = np.random.default_rng(3)
    logits = np.stack([rng.normal(size=64), rng.normal(size=64) * 1e30, rng.normal(size=64) * 1e-30]).astype(np.float32)
    for temperature in (1e-4, 1e-2, 1e3, 1e30):
        compare(logits, rows_of(*[SampleParams(temperature=temperature, top_p=0.9, seed=7)] * 3))


def test_large_logits_keep_their_logarithm():
    logits = np.float32([[1e30, 1e30, -1e30, 3e29]])
    _, logprob, entropy, _, top = _native.sample(logits, rows_of(SampleParams(target=1), top_n=2))
    assert logprob[0] == entropy[0] * -1 == top[0, 0] == pytest.approx(-np.log(2), abs=1e-7)


def test_targets_score_the_raw_logits():
    logits = np.random.default_rng(4).normal(size=(3, 100)).astype(np.float32)
    rows = rows_of(*[SampleParams(temperature=0.1, top_k=1, bias={5: 50.0}, target=t) for t in (0, 5, 99)])
    token, logprob, *_ = _native.sample(logits, rows)
    assert token.tolist() == [0, 5, 99]
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprob, logp[range(3), [0, 5, 99]], atol=1e-6)


def test_more_top_ids_than_vocabulary():
    logits = np.float32([[1.0, 2.0]])
    *_, top_ids, top_logprobs = _native.sample(logits, rows_of(SampleParams(), top_n=4))
    assert top_ids.tolist() == [[1, 0, -1, -1]] and np.isneginf(top_logprobs[0, 2:]).all()


@pytest.mark.parametrize("top_n", [-1, 1025])
def test_top_n_out_of_range(top_n):
    with pytest.raises(ValueError, match=f"top_n {top_n} is outside"):
        _native.sample(np.zeros((1, 4), np.float32), rows_of(SampleParams(), top_n=top_n))


def test_ragged_inputs_are_checked():
    logits = np.zeros((2, 8), np.float32)
    for field, value, message in [
        ("hist_start", [0, 2, 1], "hist_start decreases at row 1"), ("hist_start", [1, 1, 1], "begins with 1"),
        ("hist_start", [0, 0, 9], "hist_start ends at 9 but there are 1"), ("hist_ids", [-1], "hist id -1"),
        ("mask_row", [0, -1], "mask_row 0 of row 0 is outside the 0 masks"), ("top_k", [1], "axis 0 of top_k is 1"),
    ]:  # fmt: skip
        rows = rows_of(SampleParams(history={1: 1}), SampleParams())
        setattr(rows, field, np.array(value, np.int32))
        with pytest.raises(ValueError, match=message):
            _native.sample(logits, rows)


# Random123's known answers for Philox4x32-10: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    assert list(_native.philox4x32(*counter, *key)) == expected
    found = reference.philox4x32(np.array([counter], np.uint32), key[0] | key[1] << 32)
    assert found[0].tolist() == expected


def test_noise_depends_on_seed_and_token_index_alone():
    """The same request draws the same token in any row of any batch, with any neighbours and threads."""
    rng = np.random.default_rng(5)
    mine = rng.normal(size=5000).astype(np.float32)
    params = SampleParams(seed=2**63 + 11, token_index=17, top_p=0.95)
    alone = _native.sample(mine[None], rows_of(params))[0][0]
    for size in (2, 5, 9):
        others = rng.normal(size=(size, 5000)).astype(np.float32)
        at = int(rng.integers(0, size))
        others[at] = mine
        all_params = [SampleParams(seed=int(rng.integers(0, 2**60)), token_index=17) for _ in range(size)]
        all_params[at] = params
        for threads in (1, 2, 4):
            assert _native.sample(others, rows_of(*all_params), threads)[0][at] == alone


def test_a_draw_does_not_depend_on_how_many_are_kept():
    """The noise belongs to the id: where the winner survives a cut, it wins after the cut too."""
    logits = np.random.default_rng(6).normal(size=(1, 3000)).astype(np.float32) * 2
    for index in range(50):
        free = SampleParams(seed=1, token_index=index)
        winner = int(_native.sample(logits, rows_of(free))[0][0])
        for cut in (
            SampleParams(seed=1, token_index=index, top_k=200),
            SampleParams(1, 0, 0.8, 0, seed=1, token_index=index),
        ):
            rows = rows_of(cut)
            if winner in _native.kept(logits, rows, 0):
                assert _native.sample(logits, rows)[0][0] == winner


def chi_square_p(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Bins pooled until each expects at least 10."""
    from scipy import stats

    order = np.argsort(-probabilities)
    expected, observed = probabilities[order] * counts.sum(), counts[order]
    bins = np.minimum(np.cumsum(expected) // 10, (expected.sum() - 10) // 10).astype(int)
    expected, observed = np.bincount(bins, expected), np.bincount(bins, observed)
    filled = expected > 0
    return float(stats.chisquare(observed[filled], expected[filled]).pvalue)


@pytest.mark.parametrize("varied", ["seed", "token_index"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 40}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 2.0}],
)
def test_distribution(varied, fields):
    """10 tests with fixed seeds, each at p > 1e-4 / 10."""
    vocabulary, draws, batch = 300, 20_000, 500
    logits = (np.random.default_rng(7).normal(size=vocabulary) * 2).astype(np.float32)
    first = rows_of(SampleParams(**fields))
    ids, weight = reference.kept(logits, first, 0)
    probabilities = np.zeros(vocabulary)
    probabilities[ids] = weight / weight.sum()
    counts = np.zeros(vocabulary)
    block = np.repeat(logits[None], batch, axis=0)
    for start in range(0, draws, batch):
        rows = rows_of(*[SampleParams(**fields, **{varied: start + i}) for i in range(batch)])
        counts += np.bincount(_native.sample(block, rows, 2)[0], minlength=vocabulary)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_p(counts, probabilities) > 1e-5


def test_consecutive_tokens_are_independent():
    from scipy import stats

    logits = np.zeros((1000, 8), np.float32)
    drawn = _native.sample(logits, rows_of(*[SampleParams(seed=3, token_index=i) for i in range(1000)]))[0]
    table = np.zeros((8, 8))
    np.add.at(table, (drawn[:-1], drawn[1:]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4
