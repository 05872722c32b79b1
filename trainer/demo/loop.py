"""Runs the story, judges it, and writes what it found; ends its processes whatever happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from skerry.core.errors import SkerryError
from skerry.core.files import write_json
from skerry.trainer.demo.processes import Processes
from skerry.trainer.demo.report import write_report
from skerry.trainer.demo.settings import REAL, TINY, Settings
from skerry.trainer.demo.story import Story, clean
from skerry.trainer.demo.timeline import Timeline

STAGES = (
    ("Build datasets", "build_data"),
    ("Train v1", "train_v1"),
    ("Export v1", "export_v1"),
    ("Start the fleet", "start_fleet"),
    ("Roll v1 out", "roll_out_v1"),
    ("Serve", "serve_calm"),
    ("Drift", "shift"),
    ("Retrain and roll v2 out", "retrain"),
    ("Refuse v3 at the gate", "refuse_v3"),
    ("Revert v4 on the canary", "revert_v4"),
)


def run(workdir: Path, *, keep: bool, tiny: bool, as_json: bool) -> None:
    """Raises SkerryError when a stage breaks or something that had to happen did not."""
    settings = TINY if tiny else REAL
    workdir.mkdir(parents=True, exist_ok=True)
    timeline = Timeline()
    with Processes(workdir) as processes:
        clean(workdir)
        story = Story(workdir, settings, processes, timeline)
        try:
            for name, stage in STAGES:
                with timeline.stage(name):
                    getattr(story, stage)()
            result = judge(story, settings)
        finally:
            story.stop_traffic()
        write_json(workdir / "result.json", result)
        story.traffic.save(workdir / "traffic.jsonl")
        report(story, result, workdir / "report.html")
        if keep:
            wait_for_interrupt(story)
    tell(result, workdir, as_json)


def judge(story: Story, settings: Settings) -> dict[str, Any]:
    """`result.json`: every figure, and whether each thing that had to happen did."""
    facts, outcomes = story.facts, story.traffic.outcomes
    by_phase: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        counts = by_phase.setdefault(outcome.phase, {"total": 0, "failed": 0, "retried": 0})
        counts["total"] += 1
        counts["failed"] += outcome.failed
        counts["retried"] += outcome.retried
    result = {
        "seconds": round(story.timeline.now, 1),
        "nll": story.nll(),
        "parity": {version: story.parity(version) for version in ("v1", "v2")},
        "requests": {"total": len(outcomes), "failed": sum(o.failed for o in outcomes), "by_phase": by_phase},
        "drift": facts["drift"],
        "rollouts": story.rollout_rows(),
        "gate": facts["gate"],
        "canary": facts["canary"],
        "nodes": story.node_states(),
        "telemetry": {
            "bytes_per_node_window": story.window_bytes(),
            "prompts_sent": len(story.traffic.prompts),
            "prompts_found": story.prompts_found(),
        },
    }
    return {**result, "checks": checks(result, settings)}


def checks(result: dict[str, Any], settings: Settings) -> dict[str, bool]:
    drift, nll, phases = result["drift"], result["nll"], result["requests"]["by_phase"]
    delay = drift["alarm_window"] - drift["shift_window"]
    states = {rollout["release"]: rollout["state"] for rollout in result["rollouts"]}
    found = {
        "v1 was rolled out in waves": states.get("v1") == "SUCCEEDED",
        "no drift alarm before the shift": drift["false_alarms"] == 0,
        "the alarm came within 10 windows of the shift": delay <= settings.alarm_windows,
        "the alarm named the source that mends it": drift["source"] == "numpy",
        "v2 was trained, gated and rolled out": states.get("v2") == "SUCCEEDED",
        "no request failed while v2 went out": phases["rollout_v2"]["failed"] == 0,
        "no request failed before v4": sum(c["failed"] for p, c in phases.items() if p != "canary_v4") == 0,
        "the gate refused v3": not result["gate"]["v3"]["accepted"],
        "the canary turned v4 back": states.get("v4") == "ROLLED_BACK",
        "every node ended on v2": {node["release"] for node in result["nodes"]} == {"v2"},
        "no prompt reached the control plane": result["telemetry"]["prompts_found"] == 0,
        "telemetry stayed below 8 kB a window": result["telemetry"]["bytes_per_node_window"] <= 8000,
    }  # fmt: skip
    one, two = nll["domain_one"], nll["domain_two"]
    if settings.min_gain_v1 is not None:
        found["v1 learned its domain"] = one["v1"] <= (1 - settings.min_gain_v1) * one["base"]
    if settings.min_gain_v2 is not None:
        found["v2 learned the new domain"] = two["v2"] <= (1 - settings.min_gain_v2) * two["v1"]
    if settings.max_loss_v2 is not None:
        found["v2 kept the old domain"] = one["v2"] <= (1 + settings.max_loss_v2) * one["v1"]
    return found


def report(story: Story, result: dict[str, Any], path: Path) -> None:
    timeline = story.timeline
    rows = [
        {"node": node, "window": window, "score": point["evidence"]}
        for (release, node, window), point in sorted(story.scores.items())
        if release == "v1"
    ]
    write_report(path, result, timeline.entries, timeline.stages, story.losses(), rows, story.traffic.outcomes)


def tell(result: dict[str, Any], workdir: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
    else:
        for name, ok in result["checks"].items():
            click.echo(f"  {'yes' if ok else 'NO '}  {name}")
        click.echo(f"{result['seconds'] / 60:.1f} minutes. See {workdir}/report.html and {workdir}/result.json")
    missed = [name for name, ok in result["checks"].items() if not ok]
    if missed:
        raise SkerryError("demo", workdir, f"did not happen: {'; '.join(missed)}", f"read {workdir}/logs")


def wait_for_interrupt(story: Story) -> None:
    import time

    click.echo(
        f"The fleet runs on: {story.fleet.server}, nodes {', '.join(story.traffic.urls.values())}. Ctrl-C ends it."
    )
    try:
        while True:
            story.processes.check()
            time.sleep(1)
    except KeyboardInterrupt:
        click.echo("Ending the fleet.", err=True)
