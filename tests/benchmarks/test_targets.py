from __future__ import annotations

import json
from itertools import pairwise

import pytest

from skerry.benchmarks.all import Subject, runs
from skerry.benchmarks.engine_workload import Workload, lanes
from skerry.benchmarks.growth import describe_scaling
from skerry.benchmarks.targets import Target, read_targets, stand
from skerry.core.errors import ConfigError

ROW = {"measure": "decode", "ratio": 1.5, "low": 1.4, "high": 1.6, "peer_version": "1"}


def target(**fields) -> Target:
    return Target(
        **{"section": "s", "measure": "m", "unit": "x", "better": "higher", "must": 1.2, "stretch": 2.0, **fields}
    )


def test_the_table_is_sound():
    targets = read_targets()
    assert {one.section for one in targets} >= {"Engine on CPU", "Fleet", "Benchmark suite"}
    assert all(one.stretch is None or (one.stretch > one.must) == (one.better == "higher") for one in targets)


def test_the_engine_run_measures_what_its_targets_name(tmp_path):
    """With the words that `bench all` gives it, on a machine of two cores."""
    words = runs(Subject(tmp_path), 7)["engine"]
    given = {name: tuple(int(value) for option, value in pairwise(words) if option == f"--{name}")
             for name in ("context", "prefill")}  # fmt: skip
    every = lanes(Workload(contexts=given["context"], prefills=given["prefill"]), (2, 1))
    described = {name for lane in every for name in lane.describe()} | describe_scaling(every).keys()
    named = {one.row or one.figure for one in read_targets() if one.run == "engine"}
    assert "scaling_prefill" in named and named <= described


@pytest.mark.parametrize(("text", "cause"), [
    ("[[target]]\nmeasure = 'x'\nfigur = 'y'", "unknown key figur"),
    ("target = 3", "read targets"), ("[[target]]", "missing"),
    ("[[target]]\nsection='s'\nmeasure='m'\nunit='x'\nbetter='higher'\nmust=1.0", "needs one of"),
    ("[[target]]\nsection='s'\nmeasure='m'\nunit='x'\nbetter='up'\nmust=1.0\nfigure='f'", "needs one of"),
])  # fmt: skip
def test_a_table_that_is_not(tmp_path, text, cause):
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(ConfigError, match=cause):
        read_targets(tmp_path / "t.toml")


def test_the_best_of_the_peers_counts():
    document = {
        "rows": [
            {**ROW, "peer_name": "slow", "ratio": 4.0},
            {**ROW, "peer_name": "fast"},
            {**ROW, "peer_name": "other", "ratio": 0.1},
        ]
    }
    found = stand(target(run="engine", row="decode", peers=("slow", "fast")), {"engine": document})
    assert (found.found, found.state, found.why) == (1.5, "met", "fast 1")
    missing = stand(target(run="engine", row="decode", peers=("fast", "gone")), {"engine": document})
    assert missing.state == "met" and "without gone" in missing.why
    assert stand(target(run="engine", row="decode", peers=("gone",)), {"engine": document}).state == "not measured"


@pytest.mark.parametrize(("better", "value", "state", "stretch"), [
    ("higher", 1.2, "met", False), ("higher", 1.19, "missed", False), ("higher", 2.5, "met", True),
    ("lower", 1.2, "met", False), ("lower", 1.3, "missed", False),
])  # fmt: skip
def test_figures_and_paths(better, value, state, stretch):
    document = {"figures": {"f": {"median": value, "min": value, "max": value}}, "deep": {"er": value}}
    for source in ({"figure": "f"}, {"path": "deep.er"}):
        wanted = target(run="r", better=better, stretch=2.0 if better == "higher" else 0.5, **source)
        found = stand(wanted, {"r": document}).to_json()
        assert (found["state"], found["stretch_met"]) == (state, stretch)


def test_what_was_not_measured_says_why(tmp_path):
    assert "was not run" in stand(target(run="r", figure="f"), {}).why
    assert "no such model" in stand(target(run="r", figure="f"), {"r": {"failed": "no such model"}}).why
    assert "no figure f" in stand(target(run="r", figure="f"), {"r": {}}).why
    assert "no number" in stand(target(run="r", path="a.b"), {"r": {"a": {"b": True}}}).why
    assert stand(target(elsewhere="tests/fleet"), {}).why == "tests/fleet"
    assert "was kept" in stand(target(kept="*-x.json", path="a"), {}, (tmp_path,)).why
    (tmp_path / "2026-01-01-x.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "2026-02-01-x.json").write_text(json.dumps({"a": 3}))
    assert stand(target(kept="*-x.json", path="a"), {}, (tmp_path,)).found == 3.0
