"""`skerry bench all`: every level, then what was reached of the targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from skerry.benchmarks.cli_options import PATH, say
from skerry.core.cli import emit, json_option

KEPT = Path("benchmarks/results")


@click.command("all")
@click.argument("bundle", type=PATH)
@click.option("--int4", type=PATH, help="The same model as an int4 bundle.")
@click.option("--checkpoint", type=PATH, help="What to export, for that level.")
@click.option("--level", "levels", multiple=True, help="Only this; may be repeated.")
@click.option("--repeats", type=click.IntRange(6, 1000), default=7, show_default=True)
@click.option("--out", type=PATH, default=Path("bench"), show_default=True, help="Folder; one folder a level in it.")
@click.option("--kept", type=PATH, default=KEPT, show_default=True, help="Folder of results that were kept.")
@json_option
def all_levels(
    bundle: Path, int4: Path | None, checkpoint: Path | None, levels: tuple[str, ...], repeats: int, out: Path,
    kept: Path, as_json: bool,
) -> None:  # fmt: skip
    """Run every level on BUNDLE beside the peers that are installed, and fill the table of targets.

    A target that is missed does not fail the command: it says where we stand. A gate is what compare is for.
    """
    from skerry.benchmarks.all import Subject, run_level, runs
    from skerry.benchmarks.documents import close_document, last_line, new_document
    from skerry.benchmarks.publish import keep
    from skerry.benchmarks.targets import read_targets, stand
    from skerry.core.bundle import open_bundle
    from skerry.core.errors import UsageError

    targets = read_targets()
    for path in filter(None, (bundle, int4)):
        open_bundle(path)
    planned = runs(Subject(bundle, int4, checkpoint), repeats)
    unknown = sorted(set(levels) - planned.keys())
    if unknown:
        raise UsageError("run levels", unknown[0], "is not among those planned", ", ".join(planned))
    document = new_document("all", subject={"bundle": str(bundle), "int4": str(int4) if int4 else None},
                            settings={"repeats": repeats, "levels": list(levels or planned)})  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for name, words in planned.items():
        if not levels or name in levels:
            found[name] = run_level(name, words, out, say)
            if "failed" in found[name]:
                document["notes"].append(f"{name} failed: {found[name]['failed']}")
                say(document["notes"][-1])
    document["targets"] = [stand(target, found, (kept,)).to_json() for target in targets]
    document["rows"] = [{**row, "run": name} for name, one in found.items() for row in one.get("rows") or []]
    keep(close_document(document), out)
    emit(document, as_json, lambda: f"{table(document['targets'])}\n\n{last_line(document, out)}")


def table(standings: list[dict[str, Any]]) -> str:
    """By section: measure, must, found, state."""
    lines, section = [], ""
    width = max(len(one["measure"]) for one in standings)
    for one in standings:
        if one["section"] != section:
            section = one["section"]
            lines += ["", section]
        sign = ">=" if one["better"] == "higher" else "<="
        found = "-" if one["found"] is None else f"{one['found']:.4g}"
        state = one["state"] + (", stretch too" if one["stretch_met"] else "")
        bar = f"{sign} {one['must']:g} {one['unit']}"
        why = f" ({one['why']})" if one["why"] else ""
        lines.append(f"  {one['measure']:<{width}}  {bar:<14} {found:>9}  {state}{why}")
    return "\n".join(lines).lstrip("\n")
