"""Drift: is the traffic of this node still what the model was made for, and if not, which data would mend it?

A bundle's baseline knows, from about a hundred prompts of the training domain, how far a window of that many requests
lies from the rest when nothing has changed. A new window's distances become p-values against those, the p-values become
e-values, and a Shiryaev-Roberts e-detector adds evidence up over windows. DESIGN.md has the mathematics and sources.
Everything here is a pure function of its arguments; windows are counted in requests, never in seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skerry.core.errors import InputError
from skerry.core.features import BUCKETS, EDGES, FEATURES, HISTOGRAMS, Observation, WindowSketch, check_same_space
from skerry.core.sketch import ROWS, HashedCounts, Histogram, check_same_hash, integer, malformed, member, number

SCHEMA = 1
NULL_WINDOWS = 400
MAX_NULL_WINDOWS = 4000
P_FLOOR = 1e-4  # no claim that a hundred prompts know the tail better than one in ten thousand
# Weights of the e-values, chosen before any data. The answer's length is reported but not weighed: it follows the
# client's max_tokens more than the traffic.
WEIGHTS: dict[str, float] = {"tokens": 0.4, "prompt_tokens": 0.2, "surprise": 0.2, "entropy": 0.2, "output_tokens": 0.0}
# A distance counts only as far as it exceeds this multiple of the null's: a hundred prompts know their domain only so
# well, and a shift smaller than the baseline's own uncertainty is nobody's business. Chosen by simulation.
MARGIN: dict[str, float] = {"tokens": 1.2, **{name: 1.5 for name in HISTOGRAMS}}
TAIL_SHAPE = 0.25  # of the null's tail: heavier than exponential, moments beyond the fourth are assumed infinite
MEAN_RUN_LENGTH = 10_000.0  # windows to a false alarm, at least


@dataclass(frozen=True)
class Baseline:
    """What traffic without drift looks like. `null[feature]`: sorted distances of windows from the remaining prompts.

    `token_variance[b]`: variance between prompts of the count in hash bucket b. Serialised into a bundle's
    baseline.json.
    """

    reference: WindowSketch
    token_variance: tuple[float, ...]
    window_requests: int
    null: dict[str, tuple[float, ...]]

    @property
    def tokenizer_digest(self) -> str:
        return self.reference.tokenizer_digest

    @property
    def hash_seed(self) -> int:
        return self.reference.hash_seed

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "tokenizer_digest": self.tokenizer_digest,
            "hash_seed": self.hash_seed,
            "window_requests": self.window_requests,
            "reference": self.reference.to_json(),
            "token_variance": [float(f"{value:.6g}") for value in self.token_variance],
            "null": {name: [float(f"{value:.6g}") for value in values] for name, values in self.null.items()},
        }

    @classmethod
    def from_json(cls, raw: Any) -> Baseline:
        what = "baseline"
        schema = integer(member(raw, "schema", what), "schema", what)
        if schema != SCHEMA:
            raise malformed(what, "schema", f"version {schema}, this program knows {SCHEMA}")
        variance = _numbers(member(raw, "token_variance", what), "token_variance", BUCKETS)
        if len(variance) != BUCKETS:
            raise malformed(what, "token_variance", f"{len(variance)} values, not {BUCKETS}")
        listed = member(raw, "null", what)
        null = {name: _numbers(member(listed, name, what), name, MAX_NULL_WINDOWS) for name in FEATURES}
        if any(list(values) != sorted(values) for values in null.values()):
            raise malformed(what, "null", "the distances are not sorted")
        requests = integer(member(raw, "window_requests", what), "window_requests", what, 1 << 20)
        if requests < 1:
            raise malformed(what, "window_requests", "must be 1 or more")
        return cls(WindowSketch.from_json(member(raw, "reference", what)), variance, requests, null)


def _numbers(raw: Any, field: str, limit: int) -> tuple[float, ...]:
    if not isinstance(raw, list) or len(raw) > limit:
        raise malformed("baseline", field, f"not a list of at most {limit} numbers")
    values = tuple(number(value, field, "baseline") for value in raw)
    if any(value < 0 for value in values):
        raise malformed("baseline", field, "a value is negative")
    return values


def make_baseline(
    observations: Sequence[Observation],
    window_requests: int,
    tokenizer_digest: str,
    hash_seed: int,
    rng_seed: int = 0,
) -> Baseline:
    """Baseline of a domain from requests without drift, answered by the engine that will serve.

    NULL_WINDOWS times, `window_requests` of them are drawn without replacement as a window and measured against the
    others, so window and reference never share a request. At least 3 windows' worth of observations are needed, 6 are
    better; they must be made as production makes them (template, sampling parameters).
    """
    if window_requests < 2:
        raise InputError("make baseline", "window_requests", f"{window_requests} is less than 2")
    if len(observations) < 3 * window_requests:
        raise InputError(
            "make baseline", "observations", f"{len(observations)} are fewer than 3 windows of {window_requests}",
            "give more baseline prompts or a smaller window",
        )  # fmt: skip
    each = [WindowSketch.of([one], tokenizer_digest, hash_seed) for one in observations]
    counts = {name: np.array([one.histograms[name].counts for one in each], dtype=np.float64) for name in HISTOGRAMS}
    tokens = np.array([one.tokens.counts for one in each], dtype=np.float64)
    rng = np.random.default_rng(rng_seed)
    null: dict[str, list[float]] = {name: [] for name in FEATURES}
    for _ in range(NULL_WINDOWS):
        drawn = np.zeros(len(each), dtype=bool)
        drawn[rng.permutation(len(each))[:window_requests]] = True
        for name in HISTOGRAMS:
            value = _ordinal_distance(counts[name][drawn].sum(0), counts[name][~drawn].sum(0))
            null[name] += [] if value is None else [value]
        rest = tokens[~drawn]
        value = _token_distance(tokens[drawn].sum(0), window_requests, rest.sum(0), rest.var(0), len(rest))
        null["tokens"] += [] if value is None else [value]
    reference = WindowSketch.of(observations, tokenizer_digest, hash_seed)
    sorted_null = {name: tuple(float(f"{value:.6g}") for value in sorted(values)) for name, values in null.items()}
    variance = tuple(float(f"{value:.6g}") for value in tokens.var(0))
    return Baseline(reference, variance, window_requests, sorted_null)


def _ordinal_distance(window: np.ndarray, reference: np.ndarray) -> float | None:
    """Binned Anderson-Darling distance of two histograms [bins]; None when either is empty.

    The sum over bins of the squared difference of the two distribution functions over F(1 - F) of both together,
    weighed by the bin's mass: it sees a shift, a spread and the tails, where a divergence of shares ignores the order.
    """
    n, m = window.sum(), reference.sum()
    if n == 0 or m == 0:
        return None
    share = (window + reference) / (n + m)
    joint = np.cumsum(share)
    spread = joint * (1 - joint)
    inner = spread > 1e-12
    gap = np.cumsum(window / n) - np.cumsum(reference / m)
    return float(np.sum(share[inner] * gap[inner] ** 2 / spread[inner]))


def _token_distance(
    window: np.ndarray, requests: int, reference: np.ndarray, variance: np.ndarray, prompts: int
) -> float | None:
    """How unlikely the window's bucket counts [buckets] are under the reference; None when either has no ids.

    Per bucket twice the log-likelihood ratio of a Poisson count with its own mean against the reference's mean, divided
    by the overdispersion that the reference shows between prompts (words come in bursts). Root mean square over a row's
    buckets, mean over the rows: the square lets the few telling tokens speak, the mean keeps one unlucky row quiet.
    Two virtual prompts of even counts smooth buckets that the reference never saw.
    """
    if window.sum() == 0 or reference.sum() == 0 or prompts == 0:
        return None
    prior = 2 * reference.sum() / prompts / len(reference)
    mean = (reference + prior) / (prompts + 2)
    expected = requests * mean
    ratio = window * np.log(np.maximum(window, 1e-9) / expected) - (window - expected)
    deviance = 2 * np.maximum(ratio, 0) / np.maximum(variance / mean, 1)
    return float(np.mean(np.sqrt(np.mean(deviance.reshape(ROWS, -1) ** 2, axis=1))))


def distances(window: WindowSketch, baseline: Baseline) -> dict[str, float]:
    """Distance of each feature that both have data for."""
    check_same_space(window, baseline.reference, "compare window with baseline")
    found: dict[str, float | None] = {}
    reference = baseline.reference
    for name in HISTOGRAMS:
        found[name] = _ordinal_distance(_array(window.histograms[name]), _array(reference.histograms[name]))
    variance = np.asarray(baseline.token_variance)
    found["tokens"] = _token_distance(
        _array(window.tokens), window.requests, _array(reference.tokens), variance, reference.requests
    )
    return {name: value for name, value in found.items() if value is not None}


def _array(sketch: Histogram | HashedCounts) -> np.ndarray:
    return np.asarray(sketch.counts, dtype=np.float64)


def score(window: WindowSketch, baseline: Baseline) -> dict[str, float]:
    """p-value per feature: how often a window without drift lies this far out. 1.0 where there is nothing to compare.

    A window that lost up to half of its requests to failures is noisier than the null windows, so its distances between
    distributions, which fall as 1 / requests, are scaled back; with fewer left it says nothing: InputError. A window of
    more requests is compared as it is, conservatively.
    """
    needed = (baseline.window_requests + 1) // 2
    if window.requests < needed:
        raise InputError(
            "score window", "requests", f"{window.requests} are fewer than {needed}, half of the baseline's window"
        )
    shrink = min(1.0, window.requests / baseline.window_requests)
    p_values = dict.fromkeys(FEATURES, 1.0)
    for name, distance in distances(window, baseline).items():
        scale = 1.0 if name == "tokens" else shrink
        p_values[name] = p_value(scale * distance / MARGIN[name], baseline.null[name])
    return p_values


def p_value(distance: float, null: Sequence[float]) -> float:
    """Conservative p-value of a distance against sorted null distances, at least P_FLOOR.

    Inside the null it is the add-one rank. Beyond the 90% point a generalised Pareto tail with shape TAIL_SHAPE takes
    over where it is the smaller claim of the two; its scale is the mean excess. The scale has a floor, so that a null
    without spread (every prompt equally long) does not call the first other value impossible.
    """
    if not null:
        return 1.0
    count = len(null)
    rank = (1 + count - bisect_left(null, distance)) / (count + 1)
    knot = int(0.9 * count)
    threshold = null[knot]
    if distance <= threshold or rank > 2 / (count + 1):
        return max(rank, P_FLOOR)
    excess = sum(value - threshold for value in null[knot:]) / (count - knot)
    scale = max(excess * (1 - TAIL_SHAPE), 0.02 * threshold, 0.01)
    tail = 0.1 * (1 + TAIL_SHAPE * (distance - threshold) / scale) ** (-1 / TAIL_SHAPE)
    return min(rank, max(tail, P_FLOOR))


def e_value(p: float) -> float:
    """e-value of a p-value: the mixture over k of k p^(k-1), (1 - p + p ln p) / (p ln(p)^2). Its mean is 1 when p is
    uniform, less when p is conservative. Vovk and Wang, "E-values: calibration, combination and applications" (2021).
    """
    p = min(1.0, max(P_FLOOR, p))
    log = math.log(p)
    if log > -1e-3:
        return 0.5
    return (1 - p + p * log) / (p * log * log)


def combine(p_values: Mapping[str, float], weights: Mapping[str, float] | None = None) -> float:
    """One e-value for a window: the weighted mean of the features', valid however they depend on each other."""
    weights = WEIGHTS if weights is None else weights
    used = {name: weights.get(name, 0.0) for name in p_values}
    total = sum(used.values())
    if total <= 0:
        return 1.0
    return sum(weight * e_value(p_values[name]) for name, weight in used.items()) / total


@dataclass(frozen=True)
class Detector:
    """Evidence of drift on one node under one engine: `value` is the Shiryaev-Roberts statistic, `alarmed` latches.

    An engine swap starts a new one. `threshold` windows is the least expected run to a false alarm.
    """

    value: float = 0.0
    windows: int = 0
    alarmed: bool = False
    alarm_window: int | None = None  # 1 for the first window
    threshold: float = MEAN_RUN_LENGTH

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, raw: Any) -> Detector:
        what = "detector"
        alarmed, at = member(raw, "alarmed", what), member(raw, "alarm_window", what)
        if not isinstance(alarmed, bool):
            raise malformed(what, "alarmed", "not true or false")
        value, threshold = (number(member(raw, name, what), name, what) for name in ("value", "threshold"))
        if value < 0 or threshold <= 0:
            raise malformed(what, "value", "negative")
        windows = integer(member(raw, "windows", what), "windows", what)
        alarm_window = None if at is None else integer(at, "alarm_window", what)
        return cls(value, windows, alarmed, alarm_window, threshold)


def step(state: Detector, p_values: Mapping[str, float], weights: Mapping[str, float] | None = None) -> Detector:
    """The detector after one more window: value <- e (1 + value), an alarm once it reaches the threshold.

    value - windows is a supermartingale without drift, so the mean number of windows to an alarm is at least the
    threshold (Shin, Ramdas and Rinaldo, "E-detectors", 2023).
    """
    value = min(1e18, combine(p_values, weights) * (1 + state.value))
    windows = state.windows + 1
    alarmed = state.alarmed or value >= state.threshold
    at = state.alarm_window if state.alarmed or not alarmed else windows
    return replace(state, value=value, windows=windows, alarmed=alarmed, alarm_window=at)


def quorum(states: Mapping[str, Detector], fraction: float = 0.4, min_nodes: int = 2) -> bool:
    """Whether the fleet has drifted: at least `min_nodes` nodes, and this fraction of those that reported, alarm.

    A lying minority below `fraction` cannot cause an alarm. In a fleet smaller than `min_nodes` all must agree.
    """
    reporting = [state for state in states.values() if state.windows > 0]
    alarmed = sum(state.alarmed for state in reporting)
    return alarmed > 0 and alarmed >= min(min_nodes, len(reporting)) and alarmed >= fraction * len(reporting)


def explain(
    window: HashedCounts, sources: Mapping[str, HashedCounts], baseline: Baseline | HashedCounts
) -> list[tuple[str, float]]:
    """Data sources by how well they explain the drifted traffic, best first: (name, bits per token gained).

    For each source the window is fitted as a mixture of the baseline and the source (one share, by EM); the score is
    the gain in mean log-likelihood per token over the baseline alone. 0: the source adds nothing. Ties go by name.
    """
    known = baseline.reference.tokens if isinstance(baseline, Baseline) else baseline
    check_same_hash(window, known)
    for source in sources.values():
        check_same_hash(window, source)
    if window.total == 0:
        return [(name, 0.0) for name in sorted(sources)]
    seen, old = _array(window), _smooth(known)
    scored = [(name, _gain(seen, old, _smooth(source))) for name, source in sources.items()]
    return sorted(scored, key=lambda item: (-item[1], item[0]))


def _smooth(sketch: HashedCounts) -> np.ndarray:
    """Shares with half a token added to each bucket, so that none is impossible."""
    counts = _array(sketch) + 0.5
    return np.asarray(counts / counts.sum())


def _gain(window: np.ndarray, old: np.ndarray, new: np.ndarray, rounds: int = 50) -> float:
    share, total = 0.5, window.sum()
    for _ in range(rounds):
        mixed = (1 - share) * old + share * new
        share = float(np.sum(window * share * new / mixed) / total)
    mixed = (1 - share) * old + share * new
    return max(0.0, float(np.sum(window * np.log2(mixed / old)) / total))


__all__ = ["EDGES", "Baseline", "Detector", "combine", "e_value", "explain", "make_baseline", "quorum", "score", "step"]
