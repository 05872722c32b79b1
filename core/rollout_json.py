"""A rollout as a JSON document: what the control plane stores and shows. Read with bounds, errors name the field."""

from __future__ import annotations

from typing import Any

from skerry.core.policy import MAX_WAVES, Policy
from skerry.core.rollout import MAX_HISTORY, PHASES, STATES, Entry, Rollout
from skerry.core.sketch import integer, malformed, member, number

WHAT = "rollout"
MAX_NODES = 1_000_000
MAX_TEXT = 10_000


def rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.id,
        "release": rollout.release,
        "previous": rollout.previous,
        "policy": rollout.policy.to_json(),
        "state": rollout.state,
        "wave": rollout.wave,
        "phase": rollout.phase,
        "assigned": [list(wave) for wave in rollout.assigned],
        "stragglers": list(rollout.stragglers),
        "entered_at": rollout.entered_at,
        "reason": rollout.reason,
        "history": [vars(entry) for entry in rollout.history],
        "marks": {node: list(mark) for node, mark in sorted(rollout.marks.items())},
        "undoes": rollout.undoes,
        "provers": list(rollout.provers),
    }


def rollout_from_json(raw: Any) -> Rollout:
    marks = member(raw, "marks", WHAT)
    if not isinstance(marks, dict):
        raise malformed(WHAT, "marks", "not an object")
    assigned = _list(member(raw, "assigned", WHAT), "assigned", MAX_WAVES)
    rollout = Rollout(
        id=_text(member(raw, "id", WHAT), "id"),
        release=_text(member(raw, "release", WHAT), "release"),
        previous=_optional(member(raw, "previous", WHAT), "previous"),
        policy=Policy.from_json(member(raw, "policy", WHAT)),
        state=_one_of(member(raw, "state", WHAT), "state", STATES),
        wave=integer(_shifted(member(raw, "wave", WHAT)), "wave", WHAT, MAX_WAVES) - 1,
        phase=_one_of(member(raw, "phase", WHAT), "phase", PHASES),
        assigned=tuple(_names(wave, "assigned") for wave in assigned),
        stragglers=_names(member(raw, "stragglers", WHAT), "stragglers"),
        entered_at=number(member(raw, "entered_at", WHAT), "entered_at", WHAT),
        reason=_text(member(raw, "reason", WHAT), "reason"),
        history=tuple(_entry(line) for line in _list(member(raw, "history", WHAT), "history", MAX_HISTORY)),
        marks={_text(node, "marks"): _mark(mark) for node, mark in marks.items()},
        undoes=_optional(member(raw, "undoes", WHAT), "undoes"),
        provers=_names(raw.get("provers", []), "provers"),  # absent from rollouts of earlier versions
    )
    running = rollout.phase != "" or rollout.state == "RUNNING"
    first = -1 if rollout.phase == "PROVE" else 0
    if running and (rollout.phase == "" or not first <= rollout.wave < len(rollout.assigned)):
        raise malformed(WHAT, "wave", f"wave {rollout.wave} of {len(rollout.assigned)} in phase {rollout.phase!r}")
    return rollout


def _shifted(raw: Any) -> Any:
    return raw + 1 if isinstance(raw, int) and not isinstance(raw, bool) else raw


def _text(raw: Any, field: str) -> str:
    if not isinstance(raw, str) or len(raw) > MAX_TEXT:
        raise malformed(WHAT, field, f"not a text of at most {MAX_TEXT} characters")
    return raw


def _optional(raw: Any, field: str) -> str | None:
    return None if raw is None else _text(raw, field)


def _one_of(raw: Any, field: str, known: tuple[str, ...]) -> str:
    if raw not in known:
        raise malformed(WHAT, field, f"{str(raw)[:40]!r} is none of {', '.join(known)}")
    return str(raw)


def _list(raw: Any, field: str, limit: int) -> list[Any]:
    if not isinstance(raw, list) or len(raw) > limit:
        raise malformed(WHAT, field, f"not a list of at most {limit}")
    return raw


def _names(raw: Any, field: str) -> tuple[str, ...]:
    return tuple(_text(name, field) for name in _list(raw, field, MAX_NODES))


def _mark(raw: Any) -> tuple[int, int]:
    pair = _list(raw, "marks", 2)
    if len(pair) != 2:
        raise malformed(WHAT, "marks", "not a pair of counts")
    return integer(pair[0], "marks", WHAT), integer(pair[1], "marks", WHAT)


def _entry(raw: Any) -> Entry:
    return Entry(
        at=number(member(raw, "at", WHAT), "at", WHAT),
        state=_one_of(member(raw, "state", WHAT), "state", STATES),
        wave=integer(_shifted(member(raw, "wave", WHAT)), "wave", WHAT, MAX_WAVES) - 1,
        phase=_one_of(member(raw, "phase", WHAT), "phase", PHASES),
        reason=_text(member(raw, "reason", WHAT), "reason"),
    )
