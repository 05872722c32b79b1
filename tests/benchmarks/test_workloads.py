"""Lengths, seeds, prefixes and arrivals."""

from __future__ import annotations

import ast
import itertools
import statistics
from collections.abc import Sequence
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.benchmarks.workloads import SHAPES, fit, fixed, plan, poisson
from skerry.core.errors import InputError, UsageError


def encode(text: str) -> list[int]:
    """A token for each two characters."""
    return [crc32(text[i : i + 2].encode()) % 50_000 for i in range(0, len(text), 2)]


def common(one: Sequence[object], other: Sequence[object]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    asked = plan(shape, 400, 1, encode)
    found = SHAPES[shape]
    for lengths, values in (
        (found.prompt, [len(p.prompt) for p in asked]),
        (found.output, [p.max_tokens for p in asked]),
    ):
        assert lengths.low <= min(values) and max(values) <= lengths.high
        assert statistics.median(values) == pytest.approx(lengths.median, rel=0.2)
    assert [p.index for p in asked] == list(range(400)) and not any(p.due or p.warm_up for p in asked)
    assert found.why


def test_the_same_seed_gives_the_same_and_another_gives_others():
    for shape in SHAPES:
        assert plan(shape, 5, 1, encode, rate=2.0) == plan(shape, 5, 1, encode, rate=2.0)
        one, other = plan(shape, 5, 1), plan(shape, 5, 2)
        assert not {p.prompt for p in one} & {p.prompt for p in other}
        assert plan(shape, 3, 1) == plan(shape, 5, 1)[:3], "more requests change none of those before"


@pytest.mark.parametrize("shape", [*SHAPES, "fixed"])
def test_no_prefix_is_shared(shape):
    """16 tokens is the smallest page that caches share. Within a seed and over seeds."""
    prompts = []
    for seed in range(6):
        asked = fixed(10, 64, 4, seed) if shape == "fixed" else plan(shape, 10, seed)
        prompts += [p.prompt for p in asked]
    assert max(common(one, other) for one, other in itertools.combinations(prompts, 2)) < 16


def test_a_shared_prefix_when_asked_for():
    for asked in (fixed(4, 20, 4, 3, encode, shared_prefix=32), plan("chat", 4, 3, vocab=900, shared_prefix=32)):
        first = asked[0].prompt
        assert all(common(first, p.prompt) in range(32, 40) for p in asked[1:])
    assert [len(p.prompt) for p in fixed(4, 20, 4, 3, encode, shared_prefix=32)] == [52] * 4


def test_fixed_lengths_are_exact():
    for kind in ({"encode": encode}, {"vocab": 96}):
        asked = fixed(3, 57, 9, 0, **kind)
        assert [(len(p.prompt), p.max_tokens) for p in asked] == [(57, 9)] * 3
        assert all(isinstance(p.prompt, tuple) for p in asked)
    ids = fixed(3, 500, 9, 0, vocab=96)[0].prompt
    assert min(ids) >= 3 and max(ids) < 96
    assert len(fixed(1, 57, 9, 0)[0].prompt) == 57 * 4


def test_a_real_tokenizer(tmp_path):
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    from skerry.core.tokenizer import Tokenizer

    inner = Inner(models.BPE(vocab={sign: i for i, sign in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    asked = fixed(2, 100, 3, 0, tokenizer.encode)
    assert [len(p.prompt) for p in asked] == [100, 100]
    assert tokenizer.decode(asked[0].prompt)[:5].isdigit()


def test_a_tokenizer_that_makes_nothing_of_text():
    with pytest.raises(InputError, match="too few tokens"):
        fixed(1, 10, 1, 0, lambda text: [1, 2])


def test_code_is_code():
    for asked in plan("complete", 20, 5):
        whole = asked.prompt.rpartition("\n\n\n")[0]
        ast.parse(whole)


def test_they_fit_the_context():
    for shape in SHAPES:
        for asked in plan(shape, 50, 1, encode, context=256, shared_prefix=16):
            assert len(asked.prompt) + asked.max_tokens <= 256
    assert fixed(1, 300, 100, 1, encode, context=256)[0].max_tokens == 100


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(2, 4000))
def test_fit(prompt, output, context):
    cut, left = fit(prompt, output, context)
    assert 1 <= cut <= prompt and 1 <= left <= output and cut + left <= context
    assert (cut, left) == (prompt, output) or cut + left == context


def test_arrivals():
    times = poisson(20.0, 4000, 1)
    gaps = [later - earlier for earlier, later in itertools.pairwise((0.0, *times))]
    assert all(gap >= 0 for gap in gaps) and list(times) == sorted(times)
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1), "exponential: as spread as long"
    assert poisson(20.0, 10, 1) == times[:10] != poisson(20.0, 10, 2)
    assert [p.due for p in plan("chat", 10, 1, rate=20.0)] == list(times[:10])
    assert poisson(1.0, 0, 1) == ()


@pytest.mark.parametrize("ask", [
    lambda: poisson(0.0, 1, 1), lambda: poisson(-1.0, 1, 1), lambda: poisson(float("nan"), 1, 1),
    lambda: poisson(float("inf"), 1, 1), lambda: plan("poem", 1, 1), lambda: fixed(1, 0, 1, 1),
    lambda: fixed(1, 1, 0, 1), lambda: fixed(1, 10, 10, 1, context=1),
])  # fmt: skip
def test_usage(ask):
    with pytest.raises(UsageError):
        ask()
