"""The rules of an update: what a node does next, as pure functions of its journal and of facts about now.

    IDLE -> PREFLIGHT -> FETCH -> VERIFY -> STAGED -> WARM -> SWITCH (probation) -> COMMIT | REVERT -> IDLE

`next_step(progress, facts)` is the whole machine: no clock, disk or process of its own. `progress` is the last journal
entry, so the same function drives a running agent and one that comes back after a crash: at WARM or SWITCH with no
candidate it is a recovery, and the update starts again from STAGED while the old engine serves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from skerry.core.errors import InputError
from skerry.core.wire import Desired
from skerry.runtime.journal import Entry
from skerry.runtime.slots import SLOTS, Installed


class Step(StrEnum):
    IDLE = "IDLE"
    PREFLIGHT = "PREFLIGHT"
    FETCH = "FETCH"
    VERIFY = "VERIFY"
    STAGED = "STAGED"
    WARM = "WARM"
    SWITCH = "SWITCH"
    COMMIT = "COMMIT"
    REVERT = "REVERT"


AFTER = {
    Step.PREFLIGHT: Step.FETCH,
    Step.FETCH: Step.VERIFY,
    Step.VERIFY: Step.STAGED,
}


@dataclass(frozen=True)
class Policy:
    """Limits of warm-up and probation. Probation ends well after so many requests or seconds, whichever is first."""

    warm_seconds: float = 120.0
    probation_requests: int = 64
    probation_seconds: float = 30.0
    max_failed_ratio: float = 0.1
    min_failed: int = 3
    max_attempts: int = 3


@dataclass(frozen=True)
class Wish:
    """The engine the control plane wants on this node."""

    generation: int
    release: str
    manifest_path: str
    manifest_sha256: str
    engine_digest: str

    @classmethod
    def of(cls, desired: Desired | None) -> Wish | None:
        """None when nothing is wished for, or the wish lacks a part that names the engine."""
        if desired is None or not (desired.release and desired.manifest_path and desired.manifest_sha256):
            return None
        if not desired.engine_digest:
            return None
        return cls(
            desired.generation, desired.release, desired.manifest_path, desired.manifest_sha256, desired.engine_digest
        )


@dataclass(frozen=True)
class Update:
    """One journey to a new engine: the wish, the slot it goes to, what served before, and the tries to start it."""

    wish: Wish
    slot: str
    previous: Installed | None
    attempt: int = 1

    @property
    def installed(self) -> Installed:
        return Installed(self.slot, self.wish.manifest_sha256, self.wish.engine_digest, self.wish.release)

    def to_json(self) -> dict[str, Any]:
        return {
            "wish": asdict(self.wish), "slot": self.slot, "attempt": self.attempt,
            "previous": self.previous.to_json() if self.previous else None,
        }  # fmt: skip

    @classmethod
    def from_json(cls, raw: Any) -> Update:
        """Raises InputError."""
        try:
            previous = raw["previous"]
            if raw["slot"] not in SLOTS:
                raise ValueError(f"slot {raw['slot']!r}")
            return cls(
                wish=Wish(**raw["wish"]), slot=raw["slot"], attempt=int(raw["attempt"]),
                previous=None if previous is None else Installed.from_json(previous),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("read update", "", f"malformed: {error!r}") from error


@dataclass(frozen=True)
class Progress:
    """Where the journal stands. `quarantine` and `reason` matter at REVERT: why, and whether the digest is to blame."""

    step: Step = Step.IDLE
    update: Update | None = None
    reason: str = ""
    quarantine: bool = False

    @classmethod
    def of(cls, entry: Entry | None) -> Progress:
        """From the last journal entry. An entry of a newer version's unknown shape counts as IDLE."""
        if entry is None:
            return cls()
        try:
            update = entry.data.get("update")
            return cls(
                Step(entry.step), None if update is None else Update.from_json(update),
                str(entry.data.get("reason", "")), bool(entry.data.get("quarantine", False)),
            )  # fmt: skip
        except (ValueError, InputError):
            return cls()

    def to_data(self) -> dict[str, Any]:
        update = self.update.to_json() if self.update else None
        return {"update": update, "reason": self.reason[:1000], "quarantine": self.quarantine}


@dataclass(frozen=True)
class Job:
    """The background work of PREFLIGHT, FETCH or VERIFY."""

    step: Step
    state: Literal["running", "done", "failed"]
    reason: str = ""


@dataclass(frozen=True)
class Candidate:
    """The new engine's worker. Counts are since it began to accept; times are seconds of the agent's steady clock."""

    state: Literal["starting", "ready", "accepting", "failed"]
    since: float
    requests: int = 0
    failed: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Facts:
    """What is true now. `settled`: the committed engine serves, or there is none, or it keeps failing to."""

    now: float
    wish: Wish | None = None
    installed: Installed | None = None
    refused: frozenset[str] = frozenset()
    retry_at: float = 0.0
    job: Job | None = None
    candidate: Candidate | None = None
    settled: bool = True


@dataclass(frozen=True)
class Action:
    """`begin`: journal PREFLIGHT for the wish. `work`: do what the step asks (idempotent). `advance`: journal `to`,
    then its effect. `end`: journal IDLE with `reason` and `outcome`. `wait`: nothing until a fact changes."""

    do: Literal["wait", "begin", "work", "advance", "end"]
    to: Step | None = None
    reason: str = ""
    quarantine: bool = False
    outcome: Literal["", "committed", "reverted", "abandoned"] = ""


WAIT = Action("wait")
WORK = Action("work")


def next_step(progress: Progress, facts: Facts, policy: Policy) -> Action:
    """The one action that follows; called again after each one until it says wait."""
    update = progress.update
    if progress.step is Step.IDLE or update is None:
        return _idle(facts)
    if progress.step in AFTER:
        return _background(progress.step, update, facts)
    if progress.step is Step.STAGED:
        return _staged(update, facts, policy)
    if progress.step is Step.WARM:
        return _warm(update, facts, policy)
    if progress.step is Step.SWITCH:
        return _switch(update, facts, policy)
    if progress.step is Step.COMMIT:
        pointed = facts.installed == update.installed
        return Action("end", reason="in service", outcome="committed") if pointed else WORK
    return _revert(progress, update, facts)


def blocked(wish: Wish | None, refused: frozenset[str]) -> str:
    """Why this wish is not acted on at all; empty when it may be."""
    if wish is not None and wish.engine_digest in refused:
        return f"engine {wish.engine_digest[:12]} is quarantined"
    return ""


def _idle(facts: Facts) -> Action:
    wish, installed = facts.wish, facts.installed
    if wish is None or (installed is not None and wish.manifest_sha256 == installed.manifest_sha256):
        return WAIT
    if blocked(wish, facts.refused) or facts.now < facts.retry_at:
        return WAIT
    return Action("begin")


def _withdrawn(update: Update, facts: Facts) -> str:
    """Another wish has come since; the old one is not worth finishing."""
    if facts.wish is not None and facts.wish.manifest_sha256 != update.wish.manifest_sha256:
        return f"withdrawn: generation {facts.wish.generation} wants {facts.wish.release}"
    return blocked(update.wish, facts.refused)


def _background(step: Step, update: Update, facts: Facts) -> Action:
    reason = _withdrawn(update, facts)
    if reason:
        return Action("end", reason=reason, outcome="abandoned")
    job = facts.job
    if job is None or job.step is not step:
        return WORK
    if job.state == "failed":
        return Action("end", reason=job.reason, outcome="abandoned")
    return Action("advance", AFTER[step]) if job.state == "done" else WAIT


def _staged(update: Update, facts: Facts, policy: Policy) -> Action:
    reason = _withdrawn(update, facts)
    if reason:
        return Action("end", reason=reason, outcome="abandoned")
    if update.attempt > policy.max_attempts:
        return Action("advance", Step.REVERT, f"the node went down in {policy.max_attempts} tries to start it", True)
    return Action("advance", Step.WARM) if facts.settled else WAIT


def _warm(update: Update, facts: Facts, policy: Policy) -> Action:
    candidate = facts.candidate
    if candidate is None:
        return Action("advance", Step.STAGED, "interrupted while warming up")
    reason = _withdrawn(update, facts)
    if reason:
        return Action("advance", Step.REVERT, reason)
    if candidate.state == "failed":
        return Action("advance", Step.REVERT, candidate.reason, True)
    if candidate.state == "starting" and facts.now - candidate.since > policy.warm_seconds:
        return Action("advance", Step.REVERT, f"not ready within {policy.warm_seconds:g} s", True)
    return Action("advance", Step.SWITCH) if candidate.state == "ready" else WAIT


def _switch(update: Update, facts: Facts, policy: Policy) -> Action:
    candidate = facts.candidate
    if candidate is None:
        return Action("advance", Step.STAGED, "interrupted in probation")
    if candidate.state == "failed":
        return Action("advance", Step.REVERT, candidate.reason, True)
    if candidate.failed >= policy.min_failed and candidate.failed > policy.max_failed_ratio * candidate.requests:
        reason = f"{candidate.failed} of {candidate.requests} requests failed in probation"
        return Action("advance", Step.REVERT, reason, True)
    reason = _withdrawn(update, facts)
    previous = update.previous.manifest_sha256 if update.previous else ""
    if reason and facts.wish is not None and facts.wish.manifest_sha256 == previous:
        return Action("advance", Step.REVERT, reason)
    old_enough = facts.now - candidate.since >= policy.probation_seconds
    return Action("advance", Step.COMMIT) if old_enough or candidate.requests >= policy.probation_requests else WAIT


def _revert(progress: Progress, update: Update, facts: Facts) -> Action:
    pointed_back = facts.installed != update.installed
    quarantined = not progress.quarantine or update.wish.engine_digest in facts.refused
    if pointed_back and quarantined and facts.candidate is None and facts.settled:
        return Action("end", reason=progress.reason, outcome="reverted")
    return WORK


def advanced(progress: Progress, action: Action) -> Progress:
    """The progress to journal for `advance`; going back to STAGED counts as one more try."""
    assert action.to is not None and progress.update is not None
    update = progress.update
    if action.to is Step.STAGED and progress.step in (Step.WARM, Step.SWITCH):
        update = replace(update, attempt=update.attempt + 1)
    return Progress(action.to, update, action.reason, action.quarantine)


@dataclass(frozen=True)
class Retry:
    """Back-off after an update that was abandoned: one manifest's failures in a row and when it may be tried again."""

    manifest_sha256: str = ""
    failures: int = 0
    at: float = 0.0

    def after(self, manifest_sha256: str, now: float, poll_seconds: float) -> Retry:
        """One more failure: a poll interval (at least 0.5 s), then twice as long each time, at most 300 s."""
        failures = self.failures + 1 if manifest_sha256 == self.manifest_sha256 else 1
        return Retry(manifest_sha256, failures, now + min(300.0, max(0.5, poll_seconds) * 2.0 ** min(failures - 1, 16)))

    def until(self, manifest_sha256: str) -> float:
        return self.at if manifest_sha256 == self.manifest_sha256 else 0.0


def restart_delay(crashes: int) -> float:
    """Seconds to wait before starting a worker again after so many crashes in a row: 0, 0.5, 1, 2, ... 30."""
    return 0.0 if crashes <= 1 else min(30.0, 0.5 * 2.0 ** (crashes - 2))


def crash_loop(crashes: tuple[float, ...], now: float, limit: int = 3, seconds: float = 120.0) -> bool:
    """True when the committed engine died `limit` times within `seconds`: time to go back to the other slot."""
    return sum(1 for at in crashes if now - at <= seconds) >= limit


def fits_beside(available_bytes: int, needed_bytes: int, reserve_bytes: int = 256 << 20) -> bool:
    """Whether a second worker may be loaded while the first one still serves."""
    return available_bytes - needed_bytes >= reserve_bytes
