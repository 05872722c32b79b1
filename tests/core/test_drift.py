"""The detector's mathematics, and its behaviour on simulated traffic with Zipf-distributed tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.core.drift import (
    MEAN_RUN_LENGTH,
    P_FLOOR,
    WEIGHTS,
    Baseline,
    Detector,
    combine,
    e_value,
    explain,
    make_baseline,
    p_value,
    quorum,
    score,
    step,
)
from skerry.core.errors import InputError
from skerry.core.features import FEATURES, Observation, WindowSketch, add_prompt
from skerry.core.sketch import HashedCounts

DIGEST, SEED, REQUESTS = "d" * 64, 1234, 16
VOCABULARY, FUNCTION_WORDS = 4000, 40


def zipf(count: int) -> np.ndarray:
    shares = 1 / np.arange(1, count + 1)
    return np.asarray(shares / shares.sum())


class Traffic:
    """Requests of a domain. 45% of a prompt's tokens are function words that all domains share, the others follow
    Zipf's law over the domain's own order of the vocabulary. Surprise and entropy vary from request to request."""

    def __init__(self, seed: int, domain: int = 0, surprise: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.surprise = surprise
        order = np.random.default_rng(domain).permutation(np.arange(FUNCTION_WORDS, VOCABULARY))
        self.words = np.concatenate([np.arange(FUNCTION_WORDS), order])
        self.shares = np.concatenate([0.45 * zipf(FUNCTION_WORDS), 0.55 * zipf(len(order))])

    def requests(self, count: int) -> list[Observation]:
        return [self._one() for _ in range(count)]

    def _one(self) -> Observation:
        rng = self.rng
        prompt = int(np.clip(rng.lognormal(2.8, 0.4), 4, 200))
        answer = int(min(24, rng.geometric(1 / 20)))
        level = math.exp(rng.normal(self.surprise, 0.35))
        return Observation(
            prompt_tokens=prompt + 20,
            output_tokens=answer,
            surprise=rng.gamma(0.5, 2 * level, answer),
            entropy=rng.gamma(1.0, 1.2 * level, answer),
            prompt_ids=self.words[rng.choice(VOCABULARY, prompt, p=self.shares)],
        )

    def windows(self, count: int) -> Iterator[WindowSketch]:
        for _ in range(count):
            yield WindowSketch.of(self.requests(REQUESTS), DIGEST, SEED)


def baseline(seed: int, prompts: int = 100) -> Baseline:
    return make_baseline(Traffic(seed).requests(prompts), REQUESTS, DIGEST, SEED, rng_seed=seed)


def run(windows: Iterator[WindowSketch], known: Baseline, state: Detector | None = None) -> Detector:
    state = state or Detector()
    for window in windows:
        state = step(state, score(window, known))
    return state


@pytest.fixture(scope="module")
def known() -> Baseline:
    return baseline(1)


def test_the_calibrator_is_an_e_value() -> None:
    """Its mean over a uniform p is 1, less the tenth that lies below the floor; it falls with p."""
    p = (np.arange(100_000) + 0.5) / 100_000
    e = np.array([e_value(float(value)) for value in p])
    assert 0.89 < e.mean() <= 1.0
    assert np.all(np.diff(e) <= 1e-9)
    assert e_value(1.0) == pytest.approx(0.5) and e_value(0.999) == pytest.approx(0.5, abs=1e-3)


@given(st.dictionaries(st.sampled_from(FEATURES), st.floats(0, 1), min_size=1))
def test_combined_evidence_lies_between_the_features(p_values: dict[str, float]) -> None:
    weighed = [e_value(p) for name, p in p_values.items() if WEIGHTS[name] > 0]
    if weighed:
        assert min(weighed) - 1e-9 <= combine(p_values) <= max(weighed) + 1e-9
    else:
        assert combine(p_values) == 1.0


def test_weights_add_up_to_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1) and set(WEIGHTS) == set(FEATURES)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.floats(0, 100), st.floats(0, 100))
def test_p_values_fall_with_distance_and_respect_the_floor(null: list[float], a: float, b: float) -> None:
    null.sort()
    near, far = p_value(min(a, b), null), p_value(max(a, b), null)
    assert P_FLOOR <= far <= near <= 1


def test_p_values_without_a_null_say_nothing() -> None:
    assert p_value(5.0, []) == 1.0


def test_the_mean_run_without_drift_is_at_least_the_threshold() -> None:
    """With exactly uniform, dependent p-values, where the theorem is tight: threshold 50, mean run over 400 streams."""
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(400):
        state = Detector(threshold=50)
        while not state.alarmed and state.windows < 2000:
            p = float(rng.uniform())
            state = step(state, dict.fromkeys(FEATURES, p))
        runs.append(state.windows)
    assert np.mean(runs) >= 50


def test_no_single_window_raises_an_alarm() -> None:
    once = step(Detector(), dict.fromkeys(FEATURES, 0.0))
    assert not once.alarmed and once.value < MEAN_RUN_LENGTH / 50
    worst = once
    while not worst.alarmed:
        worst = step(worst, dict.fromkeys(FEATURES, 0.0))
    assert worst.alarm_window == 2


def test_an_alarm_latches_and_survives_json() -> None:
    state = Detector(threshold=10)
    for p in (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        state = step(state, dict.fromkeys(FEATURES, p))
    assert state.alarmed and state.alarm_window == 1 and state.windows == 8
    assert Detector.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_changed_domain_raises_an_alarm_within_six_windows(known: Baseline) -> None:
    for stream in range(5):
        settled = run(Traffic(100 + stream).windows(10), known)
        assert not settled.alarmed
        drifted = run(Traffic(200 + stream, domain=1).windows(6), known, settled)
        assert drifted.alarmed and drifted.alarm_window is not None and drifted.alarm_window <= 16


def test_a_more_surprised_model_raises_an_alarm(known: Baseline) -> None:
    """Known words, but answers the model is 2 standard deviations less sure of."""
    assert run(Traffic(300, surprise=0.7).windows(12), known).alarmed


def test_no_drift_raises_no_alarm() -> None:
    for stream in range(4):
        state = run(Traffic(400 + stream).windows(60), baseline(500 + stream))
        assert not state.alarmed and state.value < MEAN_RUN_LENGTH / 10


@pytest.mark.slow
@pytest.mark.parametrize("streams", [range(4), pytest.param(range(4, 20), marks=pytest.mark.thorough)], ids=str)
def test_no_drift_raises_no_alarm_over_many_baselines(streams: range) -> None:
    peaks = []
    for stream in streams:
        state, known = Detector(), baseline(600 + stream)
        for window in Traffic(700 + stream).windows(500):
            state = step(state, score(window, known))
            peaks.append(state.value)
        assert not state.alarmed, stream
    assert max(peaks) < MEAN_RUN_LENGTH / 10


def test_windows_that_lost_requests_are_scored_down_to_half(known: Baseline) -> None:
    for kept in (8, 12):
        state, traffic = Detector(), Traffic(800 + kept)
        for _ in range(40):
            window = WindowSketch.of(traffic.requests(kept), DIGEST, SEED)
            state = step(state, score(window, known))
        assert not state.alarmed and state.value < 1000
    with pytest.raises(InputError, match="requests"):
        score(WindowSketch.of(Traffic(1).requests(7), DIGEST, SEED), known)


def test_features_without_data_say_nothing() -> None:
    bare = [Observation(one.prompt_tokens, one.output_tokens) for one in Traffic(1).requests(60)]
    p_values = score(WindowSketch.of(bare[:16], DIGEST, SEED), make_baseline(bare, REQUESTS, DIGEST, SEED))
    assert set(p_values) == set(FEATURES)
    assert p_values["surprise"] == p_values["entropy"] == p_values["tokens"] == 1.0


def test_a_constant_feature_is_no_drift() -> None:
    same = [Observation(10, 5, (1.0,) * 5, (1.0,) * 5, (1, 2, 3)) for _ in range(60)]
    known = make_baseline(same, REQUESTS, DIGEST, SEED)
    assert min(score(WindowSketch.of(same[:16], DIGEST, SEED), known).values()) > 0.01


def test_baselines_survive_json_and_are_reproducible(known: Baseline) -> None:
    document = json.dumps(known.to_json())
    assert Baseline.from_json(json.loads(document)) == known == baseline(1)
    assert len(document) < 64_000


def test_baselines_of_too_few_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="47 are fewer than 3 windows of 16"):
        baseline(1, prompts=47)
    with pytest.raises(InputError, match="window_requests"):
        make_baseline([], 1, DIGEST, SEED)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema": 2}, "schema"),
        ({"token_variance": [0.0]}, "token_variance"),
        ({"token_variance": [float("nan")] * 256}, "token_variance"),
        ({"null": {}}, "prompt_tokens"),
        ({"null": {name: [2.0, 1.0] for name in FEATURES}}, "null"),
        ({"null": {name: [-1.0] for name in FEATURES}}, "prompt_tokens"),
        ({"window_requests": 0}, "window_requests"),
        ({"reference": 3}, "edges"),
    ],
)
def test_hostile_baselines_name_the_field(known: Baseline, change: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        Baseline.from_json({**known.to_json(), **change})


def test_windows_of_another_tokenizer_or_seed_are_refused(known: Baseline) -> None:
    listed = Traffic(1).requests(16)
    with pytest.raises(InputError, match="tokenizer_digest"):
        score(WindowSketch.of(listed, "e" * 64, SEED), known)
    with pytest.raises(InputError, match="hash_seed"):
        score(WindowSketch.of(listed, DIGEST, SEED + 1), known)


def alarm(windows: int = 5) -> Detector:
    return Detector(value=1e5, windows=windows, alarmed=True, alarm_window=windows)


def test_a_quorum_needs_a_share_and_a_number_of_nodes() -> None:
    calm = Detector(windows=5)
    assert not quorum({})
    assert not quorum({"a": calm, "b": calm, "c": calm})
    assert not quorum({"a": alarm(), "b": calm, "c": calm})
    assert quorum({"a": alarm(), "b": alarm(), "c": calm})
    assert quorum({"a": alarm()})
    assert not quorum({"a": alarm(), "b": Detector(windows=1)}, min_nodes=2)
    assert quorum({"a": alarm(), "b": Detector()}, min_nodes=2), "a node that reported nothing is not asked"


def test_a_lying_minority_is_no_quorum() -> None:
    calm = Detector(windows=5)
    states = {f"n{i}": alarm() if i < 3 else calm for i in range(10)}
    assert not quorum(states)
    assert quorum({**states, "n3": alarm()})


def tokens_of(traffic: Traffic, prompts: int) -> HashedCounts:
    counts = HashedCounts.empty(SEED)
    for request in traffic.requests(prompts):
        counts = add_prompt(counts, request.prompt_ids)
    return counts


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_source_that_explains_the_drift_comes_first(known: Baseline, share: float) -> None:
    sources = {f"domain-{d}": tokens_of(Traffic(900 + d, domain=d), 200) for d in range(4)}
    window = tokens_of(Traffic(20, domain=2), int(48 * share)).merge(tokens_of(Traffic(21), 48 - int(48 * share)))
    ranked = explain(window, sources, known)
    assert ranked[0][0] == "domain-2" and ranked[0][1] > 2 * ranked[1][1]
    assert dict(ranked)["domain-0"] < 0.5 * ranked[0][1]


def test_explaining_nothing_scores_zero(known: Baseline) -> None:
    empty = HashedCounts.empty(SEED)
    assert explain(empty, {"b": empty, "a": empty}, known) == [("a", 0.0), ("b", 0.0)]
    assert explain(empty, {}, known) == []
    with pytest.raises(InputError, match="seed"):
        explain(HashedCounts.empty(1), {}, known)
