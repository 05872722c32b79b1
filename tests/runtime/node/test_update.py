"""The update machine's rules, as a table of facts and the action that must follow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skerry.runtime.journal import Entry
from skerry.runtime.slots import Installed
from skerry.runtime.update import (
    WAIT,
    WORK,
    Action,
    Candidate,
    Facts,
    Job,
    Policy,
    Progress,
    Step,
    Update,
    Wish,
    advanced,
    crash_loop,
    fits_beside,
    next_step,
    restart_delay,
)

OLD = Installed("a", "a" * 64, "1" * 64, "v1")
WISH = Wish(5, "v2", "v2/ort-cpu.manifest.json", "b" * 64, "2" * 64)
BACK = Wish(6, "v1", "v1/ort-cpu.manifest.json", "a" * 64, "1" * 64)
THIRD = Wish(7, "v3", "v3/ort-cpu.manifest.json", "c" * 64, "3" * 64)
UPDATE = Update(WISH, "b", OLD)
FACTS = Facts(now=100.0, wish=WISH, installed=OLD)
POLICY = Policy(probation_requests=10, probation_seconds=30.0)


def at(step: Step, reason: str = "", quarantine: bool = False) -> Progress:
    return Progress(step, UPDATE, reason, quarantine)


def do(progress: Progress, **facts: object) -> Action:
    return next_step(progress, replace(FACTS, **facts), POLICY)  # type: ignore[arg-type]


def test_idle_begins_only_for_a_new_wish_that_is_not_refused_or_held_back() -> None:
    assert do(Progress()).do == "begin"
    assert do(Progress(), wish=None) == WAIT
    assert do(Progress(), wish=BACK) == WAIT
    assert do(Progress(), refused=frozenset({"2" * 64})) == WAIT
    assert do(Progress(), retry_at=101.0) == WAIT
    assert do(Progress(), installed=None).do == "begin"


@pytest.mark.parametrize("step", [Step.PREFLIGHT, Step.FETCH, Step.VERIFY])
def test_background_steps_start_wait_advance_or_give_up(step: Step) -> None:
    assert do(at(step)) == WORK
    assert do(at(step), job=Job(Step.PREFLIGHT if step is not Step.PREFLIGHT else Step.VERIFY, "done")) == WORK
    assert do(at(step), job=Job(step, "running")) == WAIT
    assert do(at(step), job=Job(step, "done")).do == "advance"
    failed = do(at(step), job=Job(step, "failed", "disk full"))
    assert (failed.do, failed.outcome, failed.reason) == ("end", "abandoned", "disk full")
    withdrawn = do(at(step), job=Job(step, "running"), wish=THIRD)
    assert withdrawn.outcome == "abandoned" and "v3" in withdrawn.reason


def test_a_wish_that_stays_away_withdraws_nothing() -> None:
    assert do(at(Step.FETCH), wish=None, job=Job(Step.FETCH, "done")).to is Step.VERIFY


def test_warming_starts_only_beside_a_settled_engine() -> None:
    assert do(at(Step.STAGED), settled=False) == WAIT
    assert do(at(Step.STAGED)).to is Step.WARM


def test_an_engine_that_takes_the_node_down_again_and_again_is_quarantined() -> None:
    progress = at(Step.SWITCH)
    for attempt in (2, 3, 4):
        action = do(progress, candidate=None)
        assert action.to is Step.STAGED
        progress = advanced(progress, action)
        assert progress.update is not None and progress.update.attempt == attempt
        if attempt <= POLICY.max_attempts:
            progress = replace(progress, step=Step.SWITCH)
    action = do(progress)
    assert action.to is Step.REVERT and action.quarantine


def test_warm_switches_when_ready_and_reverts_when_it_fails_or_takes_too_long() -> None:
    assert do(at(Step.WARM), candidate=Candidate("starting", 99.0)) == WAIT
    assert do(at(Step.WARM), candidate=Candidate("ready", 99.0)).to is Step.SWITCH
    failed = do(at(Step.WARM), candidate=Candidate("failed", 99.0, reason="golden check failed"))
    assert failed == Action("advance", Step.REVERT, "golden check failed", True)
    late = do(at(Step.WARM), candidate=Candidate("starting", 100.0 - POLICY.warm_seconds - 1))
    assert late.to is Step.REVERT and late.quarantine
    withdrawn = do(at(Step.WARM), candidate=Candidate("ready", 99.0), wish=BACK)
    assert withdrawn.to is Step.REVERT and not withdrawn.quarantine


def test_probation_ends_well_by_requests_or_by_time() -> None:
    assert do(at(Step.SWITCH), candidate=Candidate("accepting", 90.0, 9, 0)) == WAIT
    assert do(at(Step.SWITCH), candidate=Candidate("accepting", 90.0, 10, 0)).to is Step.COMMIT
    assert do(at(Step.SWITCH), candidate=Candidate("accepting", 70.0, 0, 0)).to is Step.COMMIT


def test_probation_ends_badly_by_a_crash_or_a_failed_ratio() -> None:
    dead = do(at(Step.SWITCH), candidate=Candidate("failed", 99.0, reason="worker killed by SIGSEGV"))
    assert dead.to is Step.REVERT and dead.quarantine
    few = Candidate("accepting", 99.0, 2, 2)
    assert do(at(Step.SWITCH), candidate=few) == WAIT
    many = do(at(Step.SWITCH), candidate=Candidate("accepting", 99.0, 9, 3))
    assert many.to is Step.REVERT and many.quarantine and "3 of 9" in many.reason


def test_probation_is_cut_short_when_the_fleet_goes_back_but_not_when_it_goes_on() -> None:
    candidate = Candidate("accepting", 99.0, 1, 0)
    back = do(at(Step.SWITCH), candidate=candidate, wish=BACK)
    assert back.to is Step.REVERT and not back.quarantine
    assert do(at(Step.SWITCH), candidate=candidate, wish=THIRD) == WAIT


def test_commit_points_first_and_ends_then() -> None:
    assert do(at(Step.COMMIT)) == WORK
    assert do(at(Step.COMMIT), installed=UPDATE.installed).outcome == "committed"


def test_revert_ends_only_when_quarantined_pointed_back_and_served_again() -> None:
    progress = at(Step.REVERT, "crashed", quarantine=True)
    done = {"refused": frozenset({"2" * 64})}
    assert do(progress) == WORK
    assert do(progress, **done, candidate=Candidate("accepting", 99.0)) == WORK
    assert do(progress, **done, settled=False) == WORK
    assert do(progress, **done, installed=UPDATE.installed) == WORK
    assert do(progress, **done).outcome == "reverted"


def test_progress_survives_the_journal_and_tolerates_the_unknown() -> None:
    progress = at(Step.REVERT, "crashed", quarantine=True)
    assert Progress.of(Entry(1, 0.0, progress.step, progress.to_data())) == progress
    assert Progress.of(None) == Progress()
    assert Progress.of(Entry(1, 0.0, "TELEPORT", progress.to_data())) == Progress()
    assert Progress.of(Entry(1, 0.0, "FETCH", {"update": {"slot": "z"}})) == Progress()


def test_every_step_with_every_kind_of_fact_has_an_answer() -> None:
    candidates = [None, *(Candidate(state, 99.0) for state in ("starting", "ready", "accepting", "failed"))]  # type: ignore[arg-type]
    jobs = [None, *(Job(step, state) for step in Step for state in ("running", "done", "failed"))]  # type: ignore[arg-type]
    for step in Step:
        for candidate in candidates:
            for job in jobs:
                for wish in (None, WISH, BACK, THIRD):
                    action = do(at(step), candidate=candidate, job=job, wish=wish)
                    assert action.do in ("wait", "begin", "work", "advance", "end")
                    assert (action.to is not None) == (action.do == "advance")


def test_restart_back_off_and_crash_loop() -> None:
    assert [restart_delay(n) for n in (0, 1, 2, 3, 20)] == [0.0, 0.0, 0.5, 1.0, 30.0]
    assert not crash_loop((1.0, 2.0), 3.0)
    assert crash_loop((1.0, 2.0, 3.0), 4.0)
    assert not crash_loop((1.0, 2.0, 3.0), 500.0)


def test_memory_head_room() -> None:
    assert fits_beside(1000, 500, reserve_bytes=400)
    assert not fits_beside(1000, 700, reserve_bytes=400)
