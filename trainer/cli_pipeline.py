"""`skerry pipeline`: turn retrain requests into rollouts, and look at what came of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skerry.core.cli import emit, json_option
from skerry.core.errors import DeadlineExceeded, InputError, UsageError
from skerry.trainer.cli_data import PATH
from skerry.trainer.recipe import Recipe

if TYPE_CHECKING:
    from skerry.trainer.registry import Registry
    from skerry.trainer.stages import Plan

EXIT_CODES = {"ok": 0, "rejected": 3, "failed": 1, "lost": 1}
DEFAULT_WORKDIR = Path("pipeline")
workdir_option = click.option(
    "--workdir",
    type=PATH,
    default=DEFAULT_WORKDIR,
    show_default=True,
    help="Where runs, logs and the registry are kept.",
)


@click.group()
def pipeline() -> None:
    """Turn retrain requests into rollouts."""


@pipeline.command()
@click.option("--fleet", "server", envvar="SKERRY_FLEET_SERVER", required=True, help="URL of the control plane.")
@click.option("--token-file", type=PATH, envvar="SKERRY_FLEET_TOKEN_FILE", required=True, help="The operator token.")
@workdir_option
@click.option("--sources", type=PATH, required=True, help="TOML: how each data source is built.")
@click.option("--store", type=PATH, default=Path("data"), show_default=True, help="Directory that holds the datasets.")
@click.option("--champion", type=PATH, required=True, help="Checkpoint in production, until a run has replaced it.")
@click.option("--champion-data", help="Dataset it was trained on, for replay.  [default: as its lineage says]")
@click.option("--checkpoints", type=PATH, help="Where new checkpoints go.  [default: WORKDIR/checkpoints]")
@click.option("--bundles", type=PATH, help="Where new bundles go.  [default: WORKDIR/bundles]")
@click.option("--publisher", type=PATH, required=True, help="Directory with releases.pem.")
@click.option("--once", is_flag=True, help="End after one request; exit 0 rolled out, 3 refused, 1 failed.")
@click.option("--version", default="", help="Of the new release, with --once.  [default: after the request]")
@click.option("--timeout", type=float, help="Seconds to wait for a request.")
@click.option("--poll-seconds", type=click.FloatRange(0.1), default=5.0, show_default=True)
@click.option("--steps", type=int, default=Recipe.steps, show_default=True)
@click.option("--batch", type=int, default=Recipe.batch, show_default=True)
@click.option("--max-tokens", type=int, default=Recipe.max_tokens, show_default=True)
@click.option("--lr", "learning_rate", type=float, default=Recipe.learning_rate, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--replay", type=click.FloatRange(0, 0.9), default=0.3, show_default=True,
              help="Share of training rows from the champion's data.")  # fmt: skip
@click.option("--min-gain", type=float, default=0.01, show_default=True, help="NLL share the new domain must gain.")
@click.option("--max-loss", type=float, default=0.02, show_default=True, help="NLL share other domains may lose.")
@click.option("--target", default="ort-cpu", show_default=True)
@click.option("--precision", default="auto", show_default=True, help="Of the exported engine.")
@click.option(
    "--hash-seed", type=click.IntRange(0), default=0, show_default=True, help="Of the fleet's token sketches."
)
@click.option("--waves", default="1,100%", show_default=True)
@click.option("--soak-requests", type=int, default=-1, help="Answers a wave must give before it is judged.")
@click.option("--soak-seconds", type=float, default=-1.0, help="Seconds a wave must serve before it is judged.")
@click.option("--wave-deadline", type=float, default=300.0, show_default=True)
@click.option("--rollout-timeout", type=float, default=3600.0, show_default=True)
@click.option("--gates", type=PATH, help="TOML with [gates]: how much slower than the champion's the engine may be.")
@click.option("--champion-bundle", type=PATH, help="What it is measured against.  [default: BUNDLES/VERSION of it]")
@json_option
def run(
    server: str, token_file: Path, workdir: Path, sources: Path, store: Path, champion: Path, champion_data: str | None,
    checkpoints: Path | None, bundles: Path | None, publisher: Path, once: bool, version: str, timeout: float | None,
    poll_seconds: float, gates: Path | None, champion_bundle: Path | None, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Poll for retrain requests; train, gate, export, publish and roll out what each one asks for.

    Killed at any point and started again, it continues after the last finished stage.
    """
    from skerry.trainer import pipeline as engine
    from skerry.trainer.registry import Registry
    from skerry.trainer.retrain import RetrainClient
    from skerry.trainer.sources import read_sources

    if version and not once:
        raise UsageError("run pipeline", version, "--version names one release", "add --once")
    known = read_sources(sources)
    places: dict[str, Any] = {
        "server": server, "token_file": str(token_file.absolute()), "publisher": str(publisher.absolute()),
        "store": str(store.absolute()), "checkpoints": str((checkpoints or workdir / "checkpoints").absolute()),
        "bundles": str((bundles or workdir / "bundles").absolute()), "owner": engine.owner_name(workdir),
        "registry": str((workdir / "registry.db").absolute()), "gates": str(gates.absolute()) if gates else "",
        "champion_bundle": str(champion_bundle.absolute()) if champion_bundle else "",
    }  # fmt: skip
    registry = Registry(workdir / "registry.db")
    started = time.monotonic()
    with RetrainClient(server, token_file) as client, engine.opened(workdir):
        for answer in engine.finish_unfinished():
            _tell(answer, as_json)
            if once:
                raise click.exceptions.Exit(EXIT_CODES.get(answer["state"], 1))
        while True:
            request = next((one for one in client.open_requests() if one.get("source") in known), None)
            if request is None:
                if timeout is not None and time.monotonic() - started > timeout:
                    raise DeadlineExceeded("wait for", "a retrain request", f"none within {timeout:g} s")
                time.sleep(poll_seconds)
                continue
            plan = _plan(request, known, registry, champion, champion_data, sources, version, places, settings)
            answer = engine.handle_request(request, plan)
            _tell(answer, as_json)
            if once and answer["state"] != "lost":
                raise click.exceptions.Exit(EXIT_CODES[answer["state"]])


def _plan(
    request: dict[str, Any], known: dict[str, Any], registry: Registry, champion: Path, champion_data: str | None,
    sources: Path, version: str, places: dict[str, Any], settings: dict[str, Any],
) -> Plan:  # fmt: skip
    """What a run needs, from the request, the registry's champion (or the one given at first) and the options."""
    from skerry.core.model import Checkpoint
    from skerry.trainer.pipeline import register_checkpoint
    from skerry.trainer.sources import find_source
    from skerry.trainer.stages import Plan

    current = registry.champion()
    if current is None:
        current = register_checkpoint(registry, Checkpoint.open(champion), "champion")
    path = Path(current["path"])
    Checkpoint.open(path)
    given = champion_data if champion_data and path == champion.absolute() else None
    source = find_source(known, str(request["source"]))
    if places["gates"]:
        # The bundle that was given belongs to the checkpoint that was given; later champions are those built here.
        mine = places["champion_bundle"] if path == champion.absolute() else ""
        places = {**places, "champion_bundle": mine or str(Path(places["bundles"]) / str(current["version"]))}
        if not Path(places["champion_bundle"]).is_dir():
            raise InputError("compare with", places["champion_bundle"], "no bundle of the champion is there",
                             "--champion-bundle DIR")  # fmt: skip
    return Plan(
        **places, champion=str(path), champion_data=_replay_data(given, current, Path(places["store"])),
        source=str(request["source"]), source_words=source.words(sources.absolute().parent),
        version=version or f"{current['version']}-{request['id']}", **settings,
    )  # fmt: skip


def _replay_data(given: str | None, champion: dict[str, Any], store: Path) -> str:
    """Directory of the dataset to replay, "" when there is none."""
    from skerry.core.errors import NotFound
    from skerry.trainer.data.store import open_dataset

    reference = given or (champion["lineage"].get("dataset") or {}).get("id")
    if not reference:
        return ""
    try:
        return str(open_dataset(reference, store).path.absolute())
    except NotFound as error:
        raise InputError(
            "replay", reference, f"the champion's dataset is not in {store}", "--champion-data DIR"
        ) from error


def _tell(answer: dict[str, Any], as_json: bool) -> None:
    name = answer.get("version") or answer["request"]
    verb = {"ok": "rolled out", "rejected": "refused", "lost": "left to another pipeline"}.get(
        answer["state"], "failed"
    )
    reason = f": {answer['reason']}" if answer.get("reason") else ""
    emit(answer, as_json, f"{answer['request']}: {name} {verb}{reason}")


@pipeline.command()
@workdir_option
@json_option
def resume(workdir: Path, as_json: bool) -> None:
    """Finish what an interrupted run left; exits as the last of them ended."""
    from skerry.trainer import pipeline as engine

    with engine.opened(workdir):
        answers = engine.finish_unfinished()
    lines = [f"{answer['request']}: {answer['state']}" for answer in answers]
    emit({"runs": answers}, as_json, "\n".join(lines) or "nothing was left unfinished")
    if answers and answers[-1]["state"] != "ok":
        raise click.exceptions.Exit(EXIT_CODES.get(answers[-1]["state"], 1))


@pipeline.command()
@workdir_option
@json_option
def status(workdir: Path, as_json: bool) -> None:
    """Show runs with their finished stages."""
    from skerry.trainer import pipeline as engine

    listed = engine.runs(workdir)
    lines = [
        f"{run['request']:<12} {run['status']:<9} {run['state'] or '-':<9} "
        + " ".join(f"{step['stage']}:{step['state']}" for step in run["stages"])
        for run in listed
    ]
    emit({"runs": listed}, as_json, "\n".join(lines) or "no runs yet")


@pipeline.command()
@click.argument("checkpoint", type=PATH)
@click.option("--champion", type=PATH, help="What it has to beat.  [default: the parent it was measured against]")
@click.option("--domain", required=True, help="The slice that has to become better; no other may become worse.")
@click.option("--min-gain", type=float, default=0.01, show_default=True)
@click.option("--max-loss", type=float, default=0.02, show_default=True)
@click.option("--confidence", type=float, default=0.95, show_default=True)
@json_option
def gate(
    checkpoint: Path, champion: Path | None, domain: str, min_gain: float, max_loss: float, confidence: float,
    as_json: bool,
) -> None:  # fmt: skip
    """Judge CHECKPOINT against the champion on held-out rows; exits 3 when it may not replace it."""
    from skerry.trainer.gates import Policy, judge
    from skerry.trainer.scores import compare

    before, after = compare(checkpoint, champion)
    verdict = judge(Policy(min_gain, max_loss, confidence), domain, before, after)
    lines = [f"{part.slice:<16} {part.before:.3f} -> {part.after:.3f} ({part.change:+.1%}, at most {part.high:+.1%})"
             for part in verdict.slices]  # fmt: skip
    emit(
        verdict.to_json(),
        as_json,
        "\n".join([*lines, "accepted" if verdict.accepted else f"refused: {verdict.reason}"]),
    )
    if not verdict.accepted:
        raise click.exceptions.Exit(3)


@pipeline.command()
@click.argument("digest", required=False)
@workdir_option
@click.option("--trained-on", metavar="DIGEST", help="Only what this dataset went into.")
@json_option
def models(digest: str | None, workdir: Path, trained_on: str | None, as_json: bool) -> None:
    """List registered checkpoints, or show one with its history and ancestors."""
    from skerry.trainer.registry import Registry

    registry = Registry(workdir / "registry.db")
    if digest:
        document = {**registry.get(digest), "history": registry.history(digest), "ancestry": registry.ancestry(digest)}
        records = document["ancestry"]
    else:
        records = registry.tainted_by(trained_on) if trained_on else registry.records()
        document = {"records": records}
    columns = {"kind": 10, "name": 14, "version": 14, "stage": 10, "path": 0}
    lines = [
        " ".join([one["digest"][:12], *(str(one[key]).ljust(width) for key, width in columns.items())])
        for one in records
    ]
    emit(document, as_json, "\n".join(lines) or "nothing registered yet")
