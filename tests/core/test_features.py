"""What a window counts, how big it is on the wire, and which windows are refused."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.core.errors import InputError
from skerry.core.features import (
    EDGES,
    FEATURES,
    HISTOGRAMS,
    SCORED_TOKENS,
    TOKEN_REPEATS,
    Observation,
    WindowSketch,
    add_prompt,
)
from skerry.core.files import canonical_json
from skerry.core.sketch import HashedCounts

DIGEST = "d" * 64
nats = st.lists(st.floats(0, 50), max_size=20).map(tuple)
observations = st.builds(
    Observation, st.integers(0, 5000), st.integers(0, 5000), nats, nats, st.lists(st.integers(0, 300_000), max_size=40)
)
windows = st.lists(observations, max_size=4)


def window(listed: list[Observation]) -> WindowSketch:
    return WindowSketch.of(listed, DIGEST, 99)


@settings(deadline=None, max_examples=50)
@given(windows, windows, windows)
def test_windows_merge_in_any_order_and_grouping(
    a: list[Observation], b: list[Observation], c: list[Observation]
) -> None:
    x, y, z = window(a), window(b), window(c)
    assert x.merge(y) == y.merge(x) == window(a + b)
    assert x.merge(y).merge(z) == x.merge(y.merge(z))
    assert x.merge(WindowSketch.empty(DIGEST, 99)) == x
    assert WindowSketch.from_json(json.loads(json.dumps(x.to_json()))) == x


def test_adding_leaves_the_old_window_alone() -> None:
    empty = WindowSketch.empty(DIGEST, 99)
    added = empty.add(Observation(5, 3, (0.1,), (0.2,), (1, 2)))
    assert (empty.requests, added.requests) == (0, 1)
    assert empty.tokens.total == 0 and added.tokens.total == 2


def test_only_an_answers_first_tokens_are_scored() -> None:
    long, short = (1.0,) * 500, (1.0,) * SCORED_TOKENS
    one = window([Observation(5, 9, long, long)])
    assert one.histograms == window([Observation(5, 9, short, short)]).histograms
    assert one.histograms["surprise"].total == SCORED_TOKENS


def test_bursts_of_a_token_are_capped() -> None:
    counted = add_prompt(HashedCounts.empty(1), [7] * 100 + [8])
    assert counted == HashedCounts.empty(1).add_ids([7] * TOKEN_REPEATS + [8])


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
@pytest.mark.parametrize("name", ["surprise", "entropy"])
def test_broken_values_are_refused(name: str, bad: float) -> None:
    with pytest.raises(InputError, match=name):
        window([replace(Observation(5, 3), **{name: (0.5, bad)})])


@pytest.mark.parametrize("prompt_tokens", [100, 4000])
def test_a_window_is_small(prompt_tokens: int) -> None:
    """16 requests of any length: far below the 8 kB that a window may take."""
    rng = random.Random(0)
    listed = [
        Observation(
            prompt_tokens,
            400,
            tuple(rng.expovariate(0.3) for _ in range(400)),
            tuple(rng.expovariate(0.3) for _ in range(400)),
            [rng.randrange(49_152) for _ in range(prompt_tokens)],
        )
        for _ in range(16)
    ]
    assert len(canonical_json(window(listed).to_json())) < 2_000


def test_windows_of_other_spaces_are_refused() -> None:
    one = window([Observation(5, 3)])
    with pytest.raises(InputError, match="tokenizer_digest"):
        one.merge(WindowSketch.empty("e" * 64, 99))
    with pytest.raises(InputError, match="hash_seed"):
        one.merge(WindowSketch.empty(DIGEST, 98))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"edges": 2}, "edges"),
        ({"tokenizer_digest": 5}, "tokenizer_digest"),
        ({"requests": 3}, "prompt_tokens"),
        ({"requests": -1}, "requests"),
        ({"histograms": {}}, "prompt_tokens"),
        ({"tokens": {"seed": 99, "buckets": 64, "counts": []}}, "tokens"),
        ({"tokens": None}, "seed"),
    ],
)
def test_errors_name_the_field(change: dict[str, object], field: str) -> None:
    raw = {**window([Observation(5, 3)]).to_json(), **change}
    with pytest.raises(InputError, match=field):
        WindowSketch.from_json(raw)


anything = st.none() | st.integers() | st.lists(st.integers(), max_size=3) | st.text(max_size=3)


@given(st.dictionaries(st.sampled_from(["edges", "tokenizer_digest", "requests", "histograms", "tokens"]), anything))
def test_hostile_documents_raise_input_error_or_parse(change: dict[str, object]) -> None:
    with contextlib.suppress(InputError):
        WindowSketch.from_json({**window([Observation(5, 3)]).to_json(), **change})


def test_features_have_edges_that_increase() -> None:
    assert set(FEATURES) == {*HISTOGRAMS, "tokens"}
    assert all(list(edges) == sorted(set(edges)) for edges in EDGES.values())
