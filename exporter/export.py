"""Checkpoint -> Bundle: emit, lower, measure, gate, describe, seal. Nothing is left at `out` unless all worked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.bundle import AdapterLayout, Bundle, KvGroup, open_bundle, seal
from skerry.core.chat import ChatTemplate
from skerry.core.files import write_json
from skerry.core.memory import require_memory
from skerry.core.model import ModelSpec
from skerry.core.target import Target
from skerry.core.tokenizer import Tokenizer
from skerry.exporter import gate, provenance, tensorrt, tensorrt_rtx
from skerry.exporter.adapters import check_precision, layout_of
from skerry.exporter.baseline import HASH_SEED, WINDOW_REQUESTS, measure_baseline
from skerry.exporter.engine import open_runner
from skerry.exporter.golden import MAX_MARGIN, MEAN_MARGIN, NEW_TOKENS, margins_of, measure_golden
from skerry.exporter.graph import emit, skerry_ops
from skerry.exporter.heads import told
from skerry.exporter.kv_cache import KvLoss, layouts, set_layout
from skerry.exporter.lower import Lowering, lower, rules_for
from skerry.exporter.lower_cuda import engine_spec, kv_layout
from skerry.exporter.parity import Parity, measure
from skerry.exporter.placement import WeightFile
from skerry.exporter.reference import load_reference
from skerry.exporter.rounding import DEFAULT, NOT_ROUNDED, PLAIN, Rounding, make_plan, plain_plan
from skerry.exporter.staging import check_out, staged
from skerry.exporter.subject import Subject, open_subject, plain_name, write_text_files
from skerry.exporter.targets import cannot_run
from skerry.exporter.texts import Texts, encode_prompts, encode_rows, open_texts
from skerry.kernels.blocks import BlockFormat
from skerry.kernels.memory import PACKED_ANEW

if TYPE_CHECKING:
    from skerry.kernels.runner import Runner

SAMPLE_OP = "skerry.Sample:1"
# Prompts of golden and baseline rows longer than this are left out: they would only make the export slow.
PROMPT_LIMIT = 1024
# Blocks of 32 with their scales; ONNX Runtime packs float32 matrices anew. `stored` may be all Q8_0.
BYTES_A_WEIGHT = {
    "fp32": 4 * PACKED_ANEW, "fp16": 2, "bf16": 2, "int8": 34 / 32, "int4": 20 / 32, "mixed": 34 / 32,
    "stored": 34 / 32,
}  # fmt: skip

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What may vary besides checkpoint, target and precision; of it only `max_context`, `rounding` and `adapters`
    change an engine file."""

    name: str = ""
    version: str = ""
    threads: int | None = None
    eval_dir: Path | None = None
    max_context: int | None = None
    window_requests: int = WINDOW_REQUESTS
    hash_seed: int = HASH_SEED
    kv_cache: str = "auto"  # or float32, float16, int8
    skip_baseline: bool = False
    keep_refused: bool = False
    unmeasured: bool = False
    rounding: Rounding = DEFAULT
    adapters: bool = False  # room for low-rank terms beside the products
    progress: Progress = lambda stage, done, total: None


@dataclass(frozen=True)
class Engine:
    """The engine files of a staging directory and what the manifest says of them."""

    precision: str
    groups: tuple[KvGroup, ...]
    ops: tuple[str, ...]
    rules: dict[str, int]
    formats: dict[str, int]
    settings: dict[str, Any]
    rounded: dict[str, Any]
    adapters: AdapterLayout | None = None
    kv_loss: KvLoss | None = None  # what 8-bit pages add, where that was measured


def export(checkpoint: Path, target: Target, precision: str, out: Path, options: Options | None = None) -> Bundle:
    """Raises InputError (checkpoint), IncompatibleError (target), GateFailed (quality), StorageError (disk)."""
    options = options or Options()
    check_out(out)
    compiled, sealed_for = target.backend == tensorrt_rtx.BACKEND, target
    if compiled:
        target = tensorrt_rtx.GRAPH  # which is measured; the engine is compiled from it
    subject = open_subject(checkpoint, options.max_context)
    precision = precision_of(subject, target, precision)
    rules_for(target, precision)
    kv_layouts(subject, target, options, precision)
    if compiled:
        tensorrt_rtx.check_here(sealed_for, precision)
    if options.adapters:
        check_precision(precision, sealed_for.backend)
    check_room(subject, target, precision)
    options.rounding.check(precision)
    unqualified = cannot_run(target)
    texts = open_texts(subject.directory, options.eval_dir)
    with staged(out) as staging:
        engine = build_engine(
            subject, target, precision, staging, options.progress, options.rounding, texts, options.adapters
        )
        if target.backend == tensorrt.BACKEND:
            engine = with_kv_cache(engine, staging, kv_layouts(subject, target, options, engine.precision)[0])
            sealed = seal_engine(subject, texts, engine, target, staging, options, qualified=False)
            tensorrt.add_build(sealed, engine.precision, not unqualified, options.progress)
        parity: Parity | None = None
        refused: list[str] = []
        if options.unmeasured or unqualified:
            engine = with_kv_cache(engine, staging, kv_layouts(subject, target, options, engine.precision)[0])
            if not options.unmeasured:
                options.progress("not measured", 0, 1)
                measure_by_stand_in(subject, texts, engine.precision, staging, options)
        else:
            engine, parity, refused = measure_engine(subject, texts, engine, target, staging, options)
        if compiled:
            sealed = seal_engine(subject, texts, engine, sealed_for, staging, options, qualified=False)
            tensorrt_rtx.add_engine(sealed, sealed_for, options.progress)
            unqualified = tensorrt_rtx.UNQUALIFIED
        describe(subject, texts, engine, parity, refused, staging, options, sealed_for.backend, unqualified)
        qualified = parity is not None and not refused and not unqualified
        seal_engine(subject, texts, engine, sealed_for, staging, options, qualified, unqualified)
    gate.refuse(f"{bundle_name(subject, options)} (kept at {out}, unqualified)", refused)
    return open_bundle(out, verify=False)


def precision_of(subject: Subject, target: Target, asked: str) -> str:
    """`auto` decided. Raises InputError, IncompatibleError."""
    if target.backend == tensorrt.BACKEND:
        return tensorrt.precision_of(subject.spec, asked)
    return subject.precision(asked, blocks=target.backend == "ort-cpu")


def shape_of(subject: Subject, target: Target) -> ModelSpec:
    """The shape that an engine computes in: the model's own, or with larger heads. Raises IncompatibleError."""
    return subject.spec if target.backend == "ort-cpu" else engine_spec(subject.spec)


def kv_layouts(subject: Subject, target: Target, options: Options, precision: str) -> list[str]:
    """What to measure, the one to fall back to first. Raises UsageError for pages that the target does not have."""
    if target.backend == "ort-cpu":
        return layouts(options.kv_cache, precision)
    return [kv_layout(subject.spec, precision, options.kv_cache)]


def check_room(subject: Subject, target: Target, precision: str) -> None:
    """Raises IncompatibleError before anything is read: the float32 reference holds every weight at once, beside the
    engine; rotary tables are made in extended precision."""
    spec, precision = subject.spec, subject.precision(precision)
    parts = {
        "float32 reference": 4 * spec.parameters,
        "engine": int(shape_of(subject, target).parameters * BYTES_A_WEIGHT[precision]),
        "largest matrix": 12 * spec.hidden_size * max(spec.vocab_size, spec.intermediate_size),
        "rotary tables": 28 * spec.max_context * spec.head_size,
    }
    require_memory("export", subject.name, parts, "a smaller model, --max-context, or a machine with more memory")


def build_engine(
    subject: Subject, target: Target, precision: str, out: Path, progress: Progress, rounding: Rounding = PLAIN,
    texts: Texts | None = None, adapters: bool = False,
) -> Engine:  # fmt: skip
    """graph.onnx, weights.bin and the text files, and sensitivity.json of a mixture. The same bytes for the same input
    on every machine, but for what is rounded by calibration. `texts`, the packaged ones by default, has the prompts."""
    import onnx_ir as ir

    on_cpu = target.backend == "ort-cpu"
    precision = precision_of(subject, target, precision)
    settings = write_text_files(subject, out)
    rules_for(target, precision)
    if not on_cpu:
        rounding = replace(rounding, form=BlockFormat.Q4_0)  # what MatMulNBits reads without zero points
    shape = shape_of(subject, target)
    subject = subject.with_heads(shape.head_size)
    plan = plain_plan(precision, rounding)
    if rounding.looks_at_text(precision):
        prompts = (texts or open_texts(subject.directory, None)).baseline
        plan = make_plan(subject, precision, rounding, prompts, *open_texts_files(out, settings), progress)
    if plan.report is not None:
        write_json(out / "sensitivity.json", plan.report)
    layout_of_pages = layouts("auto", precision)[0] if on_cpu else kv_layout(subject.spec, precision)
    emitted = emit(shape, subject.decoder, layout_of_pages)
    layout = layout_of(subject.decoder) if adapters else None
    with WeightFile(out / "weights.bin") as file:
        lowering = Lowering(subject.spec, precision, subject.source, file, progress, plan, layout)
        model = lower(emitted, target, lowering)
    (out / "graph.onnx").write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    ops = tuple(sorted({*skerry_ops(model), SAMPLE_OP}))
    rounded = {} if precision in NOT_ROUNDED else plan.made
    return Engine(precision, emitted.groups, ops, lowering.counts, lowering.formats(), settings, rounded, layout)


def measure_engine(
    subject: Subject, texts: Texts, engine: Engine, target: Target, staging: Path, options: Options
) -> tuple[Engine, Parity, list[str]]:
    """parity.json, golden.json and baseline.json; returns the engine with the KV cache that it is to have, its figures,
    and why the gate refuses them, if it does.

    Parity comes first and a refused engine is measured no further, unless it is to be kept.
    """
    tokenizer, template = open_texts_files(staging, engine.settings)
    rows = encode_rows(texts.parity, tokenizer, template, subject.spec.max_context)

    def with_layout(layout: str) -> tuple[Engine, Runner]:
        made = with_kv_cache(engine, staging, layout)
        bundle = seal_engine(subject, texts, made, target, staging, options, qualified=False)
        return made, open_runner(bundle, options.threads, max(len(ids) for ids, _ in rows))

    candidates = [with_layout(layout) for layout in kv_layouts(subject, target, options, engine.precision)]
    options.progress("load reference", 0, 1)
    runners = [runner for _, runner in candidates]
    parities = measure(load_reference(subject.stored), runners, rows, options.progress)
    refusals = [gate.problems(parity, engine.precision, subject.parity_nll) for parity in parities]
    loss = KvLoss.between(*parities) if len(parities) == 2 else None
    chosen = 1 if loss is not None and loss.small and not refusals[1] else 0
    engine, runner, parity, refused = *candidates[chosen], parities[chosen], refusals[chosen]
    engine = replace(with_kv_cache(engine, staging, engine.groups[0].layout), kv_loss=loss)
    document = {**parity.to_json(), "precision": engine.precision, "text": texts.origin, "kv_cache": kv_cache(engine)}
    verdict = {"passed": not refused, "reasons": refused, "limits": asdict(gate.LIMITS[engine.precision])}
    write_json(staging / "parity.json", {**_finite(document), "gate": verdict})
    if refused and not options.keep_refused:
        gate.refuse(bundle_name(subject, options), refused)
    measure_answers(subject, texts, engine.settings, runner, staging, options)
    return engine, parity, refused


def measure_answers(
    subject: Subject, texts: Texts, settings: dict[str, Any], runner: Runner, staging: Path, options: Options,
    margins: tuple[float, float] = (MEAN_MARGIN, MAX_MARGIN),
) -> None:  # fmt: skip
    """golden.json and baseline.json, as the runner answers."""
    tokenizer, template = open_texts_files(staging, settings)
    longest = min(PROMPT_LIMIT, subject.spec.max_context // 2)
    golden, _ = encode_prompts(texts.golden, tokenizer, template, longest)
    options.progress("golden", 0, 1)
    write_json(staging / "golden.json", measure_golden(runner, golden, settings, margins))
    if not options.skip_baseline:
        prompts, asked = encode_prompts(texts.baseline, tokenizer, template, longest)
        baseline = measure_baseline(
            runner, prompts, asked, settings, tokenizer.digest, options.window_requests, options.hash_seed,
            lambda done, total: options.progress("baseline", done, total),
        )  # fmt: skip
        write_json(staging / "baseline.json", baseline)


def measure_by_stand_in(subject: Subject, texts: Texts, precision: str, staging: Path, options: Options) -> None:
    """Where the engine cannot be run: answers of the same checkpoint in float32 on the CPU, which the first device that
    runs it is to repeat within what its precision allows."""
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".stand-in.") as directory:
        stand_in, target = Path(directory), Target("ort-cpu")
        made = build_engine(subject, target, "fp32", stand_in, options.progress, texts=texts)
        bundle = seal_engine(subject, texts, made, target, stand_in, options, qualified=False)
        longest = min(PROMPT_LIMIT, subject.spec.max_context // 2) + NEW_TOKENS
        with open_runner(bundle, options.threads, longest) as runner:
            measure_answers(subject, texts, made.settings, runner, staging, options, margins_of(precision))


def with_kv_cache(engine: Engine, staging: Path, layout: str) -> Engine:
    return replace(engine, groups=set_layout(staging / "graph.onnx", engine.groups, layout))


def kv_cache(engine: Engine) -> dict[str, Any]:
    """The pages' layout, and what 8-bit ones add or would have added to the loss."""
    found: dict[str, Any] = {"layout": engine.groups[0].layout}
    return found if engine.kv_loss is None else found | {"int8_adds": engine.kv_loss.to_json()}


def open_texts_files(directory: Path, settings: dict[str, Any]) -> tuple[Tokenizer, ChatTemplate]:
    template = ChatTemplate.open(directory, str(settings["bos_token"]), str(settings["eos_token"]))
    return Tokenizer.open(directory), template


def _finite(document: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a figure of a broken engine that is none becomes null."""
    import math

    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in document.items()}


def describe(
    subject: Subject, texts: Texts, engine: Engine, parity: Parity | None, refused: list[str], out: Path,
    options: Options, backend: str, unqualified: str = "",
) -> None:  # fmt: skip
    """model_card.md and sbom.cdx.json."""
    name, version = bundle_name(subject, options), bundle_version(subject, options)
    card = provenance.model_card(
        subject, name, version, engine.precision, parity, refused, texts, unqualified, told(subject.spec, engine.groups)
    )
    (out / "model_card.md").write_text(card, encoding="utf-8")
    write_json(out / "sbom.cdx.json", provenance.sbom(subject, name, version, out / "weights.bin", backend))


def seal_engine(
    subject: Subject, texts: Texts, engine: Engine, target: Target, out: Path, options: Options, qualified: bool,
    unqualified: str = "",
) -> Bundle:  # fmt: skip
    made = provenance.recipe(subject, engine.precision, str(target), engine.rules, engine.formats, engine.rounded)
    return seal(
        out, name=bundle_name(subject, options), version=bundle_version(subject, options), target=target,
        model=subject.spec, precision=engine.precision, kv=engine.groups, max_context=subject.spec.max_context,
        ops=engine.ops, qualified=qualified, lineage=provenance.lineage(subject, made, texts),
        adapters=engine.adapters, unqualified=unqualified,
    )  # fmt: skip


def bundle_name(subject: Subject, options: Options) -> str:
    return plain_name(options.name) if options.name else subject.name


def bundle_version(subject: Subject, options: Options) -> str:
    return plain_name(options.version or str(subject.lineage.get("version") or "0"))
