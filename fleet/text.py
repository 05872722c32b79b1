"""Answers of the control plane as text for a person at a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell; a dash where there is nothing."""
    cells = [["-" if cell in (None, "") else str(cell) for cell in row] for row in rows]
    widths = [
        max(len(title), *(len(row[i]) for row in cells)) if cells else len(title) for i, title in enumerate(header)
    ]
    lines = [header, *cells]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def ago(at: float | None) -> str:
    if at is None:
        return "never"
    seconds = max(0, time.time() - at)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def short(digest: str | None) -> str:
    return digest[:12] if digest else ""


def nodes(listed: Sequence[Any]) -> str:
    rows = [
        (
            one["name"],
            one["status"],
            one["state"],
            one["release"],
            short(one["observed_digest"]),
            one["wanted_release"],
            one["requests"],
            one["failed"],
            ago(one["seen_at"]),
        )
        for one in listed
    ]
    header = ("NAME", "STATUS", "STATE", "RELEASE", "OBSERVED", "WANTED", "REQUESTS", "FAILED", "SEEN")
    return table(header, rows)


def node(document: Any) -> str:
    fields = ("node", "status", "state", "release", "observed_digest", "wanted_release", "requests", "failed", "labels")
    lines = [f"{name:<16} {document[name]}" for name in fields]
    events = [(clock(one["received_at"]), one["kind"], facts(one["data"])[:100]) for one in document["events"][:20]]
    return "\n".join([*lines, "", table(("RECEIVED", "EVENT", "DATA"), events)])


def facts(data: Any) -> str:
    """What an event says, on one line: digests short and last, nothing that is empty."""
    said = {key: value for key, value in data.items() if value not in (None, "", {}, [])}
    order = sorted(said, key=lambda key: key.endswith("digest"))
    return " ".join(f"{key}={short(said[key]) if key.endswith('digest') else said[key]}" for key in order)


def releases(listed: Sequence[Any]) -> str:
    rows = [
        (one["version"], clock(one["created_at"]), target, short(bundle["engine"]), one["floor"],
         release_status(one, bundle))
        for one in listed
        for target, bundle in one["bundles"].items()
    ]  # fmt: skip
    return table(("VERSION", "PUBLISHED", "TARGET", "ENGINE", "FLOOR", "STATUS"), rows)


def release_status(release: Any, bundle: Any) -> str:
    """Of one of its bundles; empty where nothing is special."""
    if bundle["engine"] in release["quarantined"]:
        return "quarantined"
    state = bundle["qualification"]["state"]
    return "" if state == "proven" else state


def plan(document: Any) -> str:
    of = document["plan"]
    head = (
        f"{document['release']} after {document['previous'] or 'nothing'}: {of['nodes']} nodes, {of['online']} online"
    )
    waves = [f"  wave {i + 1}: {w['size']:>5} -> {w['nodes_in_total']} nodes" for i, w in enumerate(of["waves"])]
    left = [f"  no bundle for: {', '.join(of['without_a_bundle'])}"] if of["without_a_bundle"] else []
    if of["unproven"]:
        count = len(of["to_prove"])
        what = "an engine that ran nowhere yet is" if count == 1 else f"{count} engines that ran nowhere yet are"
        left.append(f"  before them {what} proven, by one node each of {', '.join(of['unproven'])}")
    tail = ["dry run: nothing was changed" if document["dry_run"] else f"started {document['rollout']}"]
    return "\n".join([head, *waves, *left, *tail])


def step(document: Any) -> str:
    wave = f"wave {document['wave'] + 1}/{len(document['policy']['waves'])}" if document["wave"] >= 0 else ""
    return "  ".join(
        part for part in (document["id"], document["state"], wave, document["phase"], document["reason"]) if part
    )


def rollout(document: Any) -> str:
    waves = document["policy"]["waves"]
    lines = [
        step(document),
        f"  {document['release']} after {document['previous'] or 'nothing'}, {document['seconds']:.0f} s",
    ]
    for index, size in enumerate(waves):
        assigned = document["assigned"][index] if index < len(document["assigned"]) else []
        mark = ">" if index == document["wave"] and document["live"] else " "
        lines.append(f" {mark} wave {index + 1} ({size}): {', '.join(assigned) or '-'}")
    if document.get("provers"):
        lines.insert(2, f"   proving: {', '.join(document['provers'])}")
    if document["stragglers"]:
        lines.append(f"  stragglers: {', '.join(document['stragglers'])}")
    return "\n".join(lines)


def rollouts(listed: Sequence[Any]) -> str:
    rows = [
        (one["id"], one["release"], one["previous"], one["state"], one["phase"],
         f"{one['wave'] + 1}/{len(one['policy']['waves'])}", clock(one["created_at"]), one["reason"][:60])
        for one in listed
    ]  # fmt: skip
    return table(("ID", "RELEASE", "PREVIOUS", "STATE", "PHASE", "WAVE", "STARTED", "REASON"), rows)


def history(document: Any) -> str:
    rows = [
        (clock(one["at"]), one["state"], one["phase"], one["wave"] + 1 if one["wave"] >= 0 else "", one["reason"])
        for one in document["history"]
    ]
    return table(("AT", "STATE", "PHASE", "WAVE", "REASON"), rows)


def audit(document: Any) -> str:
    rows = [
        (one["seq"], clock(one["at"]), one["actor"], one["action"], one["object"][:24]) for one in document["entries"]
    ]
    verdict = "the chain is intact" if document["intact"] else f"the chain is BROKEN at entry {document['broken_at']}"
    return table(("NO", "AT", "WHO", "WHAT", "OBJECT"), rows[-50:]) + f"\n{verdict}"


def sources(listed: Sequence[Any]) -> str:
    rows = [
        (one["name"], f"{one['tokens']:,}", short(one["tokenizer_digest"]), clock(one["updated_at"])) for one in listed
    ]
    return table(("NAME", "TOKENS", "TOKENIZER", "UPDATED"), rows)


def retrain(listed: Sequence[Any]) -> str:
    rows = [
        (one["id"], one["state"], one["release"], one["source"], one["owner"], clock(one["created_at"]),
         len(one["alarmed_nodes"]))
        for one in listed
    ]  # fmt: skip
    return table(("ID", "STATE", "RELEASE", "SOURCE", "OWNER", "FILED", "NODES"), rows)


def drift(document: Any) -> str:
    rows = [
        (one["name"], one["release"], short(one["engine_digest"]), one["windows"], f"{one['value']:.3g}",
         "ALARM" if one["alarmed"] else "", one["alarm_window"])
        for one in document["nodes"]
    ]  # fmt: skip
    verdict = "the fleet has drifted" if document["quorum"] else "no drift that the fleet agrees on"
    header = ("NODE", "RELEASE", "ENGINE", "WINDOWS", "EVIDENCE", "STATE", "AT WINDOW")
    return table(header, rows) + f"\n{document['release'] or 'no release'}: {verdict}"


@contextmanager
def upload_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, only where somebody looks."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress(
        "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("upload", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
