"""`report.html`: one self-contained page that shows what the demo did, with its plots as inline SVG."""

from __future__ import annotations

import html
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from skerry.trainer.demo.traffic import Outcome

COLOURS = ("#0b6e99", "#c2571a", "#3a7d44", "#7a4fa3", "#b0892f")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;color:#1c2530}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin-top:2.2rem;border-bottom:1px solid #d8dee4}
table{border-collapse:collapse;margin:.5rem 0} td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top}
th{font-weight:600;color:#57606a} .ok{color:#1a7f37} .no{color:#cf222e} svg{width:100%;height:auto}
td.n{text-align:right;font-variant-numeric:tabular-nums} code{font-size:.9em}
"""


def write_report(
    path: Path,
    result: Mapping[str, Any],
    timeline: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    drift: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
) -> None:
    """`drift` rows: node, window, score, at; `losses`: training loss by step for each version."""
    checks = "".join(_check(name, ok) for name, ok in result["checks"].items())
    parts = [
        f"<h1>Skerry demo</h1><p>{_verdict(result)} in {result['seconds'] / 60:.1f} minutes.</p>",
        f"<h2>What had to happen</h2><table>{checks}</table>",
        f"<h2>Stages</h2>{_svg(_plot_stages(stages))}",
        f"<h2>Training</h2>{_nll_table(result['nll'])}{_svg(_plot_losses(losses))}",
        f"<h2>Engines against their float32 checkpoints</h2>{_parity_table(result['parity'])}",
        f"<h2>Drift</h2><p>{_drift_words(result['drift'])}</p>{_svg(_plot_drift(drift, result['drift']))}",
        f"<h2>Rollouts</h2>{_rollout_table(result['rollouts'])}",
        f"<h2>Time to first token, per node</h2>{_svg(_plot_latency(outcomes, stages))}",
        f"<h2>Bad releases</h2><p>v3 at the gate: {html.escape(result['gate']['v3']['reason'])}</p>"
        f"<p>v4 on the canary: {html.escape(result['canary']['v4']['reason'])}</p>",
        f"<h2>Timeline</h2><table>{''.join(_entry(entry) for entry in timeline)}</table>",
    ]
    body = "\n".join(parts)
    write_atomic(path, f"<!doctype html><html lang=en><meta charset=utf-8><title>Skerry demo</title>"
                       f"<style>{STYLE}</style><body>{body}</body></html>")  # fmt: skip


def _verdict(result: Mapping[str, Any]) -> str:
    return "Everything happened" if all(result["checks"].values()) else "<b class=no>Not everything happened</b>"


def _check(name: str, ok: bool) -> str:
    mark = "<span class=ok>yes</span>" if ok else "<span class=no>no</span>"
    return f"<tr><td>{mark}</td><td>{html.escape(name)}</td></tr>"


def _entry(entry: Mapping[str, Any]) -> str:
    at = int(entry["at"])
    return f"<tr><td class=n>{at // 60:02d}:{at % 60:02d}</td><td>{html.escape(entry['text'])}</td></tr>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{heads}</tr>{lines}</table>"


def _nll_table(nll: Mapping[str, Mapping[str, float]]) -> str:
    versions = ("base", "v1", "v2")
    rows = [[domain.replace("_", " "), *(f"{nll[domain][v]:.3f}" for v in versions)] for domain in nll]
    return _table(("holdout NLL, nats per answer token", *versions), rows)


def _parity_table(parity: Mapping[str, Mapping[str, float]]) -> str:
    rows = [[v, f"{p['ppl_ratio']:.4f}", f"{p['kl']:.5f}", f"{100 * p['top1']:.1f}%"] for v, p in parity.items()]
    return _table(("release", "perplexity ratio", "mean KL", "top-1 agreement"), rows)


def _rollout_table(rollouts: Sequence[Mapping[str, Any]]) -> str:
    rows = [[r["release"], r["state"], str(r["waves"]), f"{r['seconds']:.0f} s"] for r in rollouts]
    return _table(("release", "state", "waves entered", "took"), rows)


def _drift_words(drift: Mapping[str, Any]) -> str:
    return html.escape(
        f"Questions moved to the second domain at window {drift['shift_window']} of each node; the quorum raised the "
        f"alarm at window {drift['alarm_window']}, after {drift['false_alarms']} false alarms, and named the data "
        f"source {drift['source']!r}."
    )


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _plot_stages(stages: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = _figure(0.32 * len(stages) + 0.8)
    for row, stage in enumerate(reversed(stages)):
        axes.barh(row, (stage["ended"] - stage["began"]) / 60, left=stage["began"] / 60, color=COLOURS[0], height=0.6)
    axes.set_yticks(range(len(stages)), [stage["name"] for stage in reversed(stages)])
    axes.set_xlabel("minutes")
    return figure


def _plot_losses(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    figure, axes = _figure(2.8)
    for colour, (version, points) in zip(COLOURS, losses.items()):
        axes.plot([step for step, _ in points], [loss for _, loss in points], color=colour, label=version)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.legend(frameon=False)
    return figure


def _plot_drift(drift: Sequence[Mapping[str, Any]], words: Mapping[str, Any]) -> Figure:
    figure, axes = _figure(3.0)
    by_node: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in drift:
        by_node[row["node"]].append((row["window"], max(row["score"], 1e-2)))
    for colour, (node, points) in zip(COLOURS, sorted(by_node.items())):
        axes.plot([w for w, _ in points], [s for _, s in points], color=colour, marker=".", label=node)
    axes.axvline(words["shift_window"], color="#57606a", linestyle=":", label="shift")
    if words["alarm_window"] is not None:
        axes.axvline(words["alarm_window"], color="#cf222e", linestyle="--", label="alarm")
    axes.set_yscale("log")
    axes.set_xlabel("window of each node")
    axes.set_ylabel("evidence of drift")
    axes.legend(frameon=False, ncols=5)
    return figure


def _plot_latency(outcomes: Sequence[Outcome], stages: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = _figure(3.0)
    nodes = sorted({outcome.node for outcome in outcomes})
    for colour, node in zip(COLOURS, nodes):
        mine = [o for o in outcomes if o.node == node]
        good = [(o.started / 60, 1000 * o.ttft) for o in mine if not o.failed and o.ttft]
        axes.scatter([t for t, _ in good], [v for _, v in good], s=5, color=colour, label=node)
        bad = [o.started / 60 for o in mine if o.failed]
        axes.scatter(bad, [1.0] * len(bad), s=24, color=colour, marker="x")
    axes.set_yscale("log")
    axes.set_xlabel("minutes (a cross is a failed request)")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, ncols=5)
    return figure
