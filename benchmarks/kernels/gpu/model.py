"""`make gpu-check ARGS="--bundle B --reference R"`: a whole model end to end on the device.

B is a bundle for ort-cuda, R one of the same checkpoint for ort-cpu in fp32, which is what is agreed with and where
torch, the peer, has its weights from. Without R there is the chat and our own speed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from skerry.benchmarks.kernels.contest import OURS, Case, compete
from skerry.benchmarks.kernels.gpu import model_agreement, model_speed
from skerry.benchmarks.kernels.gpu.model_chat import SERVER, TEXT, in_process, lacking, over_http, text_of
from skerry.benchmarks.kernels.gpu.torch_llama import TorchLlama
from skerry.benchmarks.kernels.setting import Setting
from skerry.benchmarks.stats import Figure
from skerry.core.bundle import read_manifest
from skerry.core.chat import encode_row
from skerry.core.errors import NotFound, SkerryError, UsageError
from skerry.core.files import read_json
from skerry.kernels.device_arrays import DeviceArrays, GpuArrays
from skerry.kernels.library import library_path
from skerry.kernels.runner import Runner

EXPORT = "skerry export CHECKPOINT --target {} --precision {} --out {} on any machine"
NO_BUNDLE = (
    f"a whole model: {EXPORT.format('ort-cuda', 'fp16', 'B')}, {EXPORT.format('ort-cpu', 'fp32', 'R')}, "
    "then make gpu-check ARGS='--bundle B --reference R'"
)
NO_REFERENCE = f"agreement with float32, and torch's speed: {EXPORT.format('ort-cpu', 'fp32', 'R')}"
TEXTS = Path(__file__).resolve().parents[3] / "exporter" / "data" / "parity.jsonl"
MOST_TEXTS, MOST_TOKENS = 12, 256
# Of torch's logits: root mean square of the error over the spread of float32's.
PEER_TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
DECODED = 8  # tokens of that check which go through its decode step


@dataclass
class Subject:
    """What is measured, and torch's name of the device; "" where torch takes no part."""

    runner: Runner
    reference: Runner | None
    torch_device: str
    setting: Setting

    @property
    def dtype(self) -> str:
        """torch's, that the engine's activations have."""
        halves = self.runner.manifest.precision == "bf16" or self.runner.manifest.kv[0].layout == "bf16.t16"
        return "bfloat16" if halves else "float16"


def missing(
    bundle: Path | str | None, reference: Path | str | None, provider: str = GpuArrays.provider
) -> dict[str, str]:
    """What this part lacks here -> what is therefore not done."""
    if bundle is None:
        return {"--bundle": NO_BUNDLE}
    found = {name: "the chat, agreement on more than golden rows" for name in lacking(TEXT)}
    found |= {name: "the chat over HTTP: it is held in process" for name in lacking(SERVER)}
    if reference is None:
        found["--reference"] = NO_REFERENCE
    if not can_run(provider):
        found[f"our ops in an ONNX Runtime with {provider}"] = "a whole model"
    return found


def check_bundles(bundle: Path | str | None, reference: Path | str | None) -> None:
    """Raises UsageError, BundleError: they are not what their options ask for, or not of one model."""
    if bundle is None:
        if reference is not None:
            raise UsageError("check GPU", "--reference", "there is no --bundle to compare with it", NO_BUNDLE)
        return
    ours = read_manifest(bundle).manifest
    if ours.target.backend != "ort-cuda":
        raise UsageError(
            "check GPU", "--bundle", f"{bundle} is for {ours.target}", EXPORT.format("ort-cuda", "fp16", "B")
        )
    if reference is None:
        return
    theirs = read_manifest(reference).manifest
    if theirs.precision != "fp32" or theirs.target.backend != "ort-cpu":
        cause = f"{reference} is {theirs.precision} for {theirs.target}: its margins are not float32's"
        raise UsageError("check GPU", "--reference", cause, EXPORT.format("ort-cpu", "fp32", "R"))
    if replace(ours.model, max_context=1) != replace(theirs.model, max_context=1):
        cause = f"{reference} is another model than {bundle}"
        raise UsageError("check GPU", "--reference", cause, "export both of one checkpoint")


def can_run(provider: str) -> bool:
    """Whether ONNX Runtime has it, and our ops for ONNX Runtime were built."""
    try:
        library_path()
        return provider in importlib.import_module("onnxruntime").get_available_providers()
    except (ImportError, NotFound):
        return False


def measure(
    document: dict[str, Any], bundle: Path | str, reference: Path | str | None, arrays: DeviceArrays, torch_device: str,
    setting: Setting, repeats: int,
) -> list[SkerryError]:  # fmt: skip
    """Fills `model`, `figures`, `rows` and `notes`. An error ends its part, is in what is returned, and the other parts
    go on."""
    made, failed = document.setdefault("model", {}), list[SkerryError]()

    def guarded(name: str, part: Callable[[], None]) -> None:
        setting.report(f"whole model: {name}")
        try:
            part()
        except Exception as caught:  # noqa: BLE001 - whatever a device's libraries raise ends one part
            said = str(caught).strip().partition("\n")[0]
            other = SkerryError("measure", f"whole model, {name}", f"{type(caught).__name__}: {said}")
            failed.append(caught if isinstance(caught, SkerryError) else other)

    def chat(through: Callable[[], dict[str, Any]]) -> None:
        made["chat"] = through()

    def opened() -> None:
        with ExitStack() as stack:
            subject = _open(stack, bundle, reference, arrays, torch_device, setting)
            made["bundle"], made["reference"] = _described(subject.runner), _described(subject.reference)
            if "chat" not in made and not lacking(TEXT):
                guarded("chat in process", lambda: chat(lambda: in_process(subject.runner)))
            guarded("agreement", lambda: _agree(made, subject))
            guarded("speed", lambda: _race(document, subject, repeats))

    if arrays.device == GpuArrays.device and not lacking((*TEXT, *SERVER)):
        guarded("chat over HTTP", lambda: chat(lambda: over_http(bundle)))
    guarded("open", opened)
    document["notes"] += setting.notes
    setting.notes = []
    return failed


def _open(
    stack: ExitStack,
    bundle: Path | str,
    reference: Path | str | None,
    arrays: DeviceArrays,
    torch_device: str,
    setting: Setting,
) -> Subject:
    """Raises SkerryError: an engine does not open, or the two do not belong together."""
    check_bundles(bundle, reference)
    page_size = read_manifest(bundle).manifest.kv[0].page_size
    texts = -(-MOST_TOKENS // page_size)
    runner = Runner.open(bundle, pages=max(texts, model_speed.pages(page_size)), arrays=arrays)
    stack.enter_context(runner)
    wide = None if reference is None else stack.enter_context(Runner.open(reference, pages=texts))
    return Subject(runner, wide, torch_device, setting)


def _described(runner: Runner | None) -> dict[str, Any] | None:
    if runner is None:
        return None
    manifest = runner.manifest
    return {
        "name": manifest.name, "version": manifest.version, "target": str(manifest.target),
        "precision": manifest.precision, "kv": manifest.kv[0].layout, "sha256": runner.bundle.digest,
        "model": manifest.model.to_json(),
    }  # fmt: skip


def texts_of(subject: Subject) -> list[list[int]]:
    """Token ids: the golden rows of both bundles, each once, and packaged conversations where they can be read."""
    found: list[list[int]] = []
    for runner in filter(None, (subject.runner, subject.reference)):
        with contextlib.suppress(NotFound):
            found += [row["ids"] for row in read_json(runner.bundle.file("golden.json"))["rows"]]
    if not lacking(TEXT):
        tokenizer, template = text_of(subject.runner.bundle)
        for line in TEXTS.read_text(encoding="utf-8").splitlines()[:MOST_TEXTS]:
            found.append(encode_row(json.loads(line), tokenizer, template)[0])
    most = min(MOST_TOKENS, subject.runner.max_context)
    return [list(ids) for ids in dict.fromkeys(tuple(ids[:most]) for ids in found)]


def _agree(made: dict[str, Any], subject: Subject) -> None:
    """Raises GateFailed where a token differs that must not."""
    if subject.reference is None:
        return
    judged = [
        model_agreement.judge(subject.reference.logits_for(ids), subject.runner.logits_for(ids))
        for ids in texts_of(subject)
    ]
    made["agreement"] = found = model_agreement.figures(judged)
    model_agreement.check(found, subject.runner.bundle.short)


def _race(document: dict[str, Any], subject: Subject, repeats: int) -> None:
    torch, setting = next(iter(_torch(subject)), None), subject.setting
    decodes = list(model_speed.decode_cases(subject.runner, torch, setting))
    prompts = [model_speed.prefill_case(subject.runner, torch, setting)]
    for cases, calls in ((decodes, model_speed.STEPS), (prompts, model_speed.PROMPTS)):
        setting.notes += compete(cases, repeats, setting.seed, setting.report, calls=calls)
        for case in cases:
            document["figures"] |= speeds(case)
            document["rows"] += case.rows()


def _torch(subject: Subject) -> list[TorchLlama]:
    """None, and a note why, where torch does not build or computes something else."""
    if subject.reference is None or not subject.torch_device or "torch" not in subject.setting.peers:
        return []
    try:
        made = TorchLlama(subject.reference.bundle, subject.torch_device, subject.dtype)
        check_torch(made, subject.reference, texts_of(subject)[0])
    except (SkerryError, RuntimeError, ImportError, IndexError) as error:
        subject.setting.notes.append(f"whole model: no torch: {error}")
        return []
    return [made]


def check_torch(made: TorchLlama, reference: Runner, ids: list[int]) -> None:
    """Raises SkerryError where its logits are not the model's."""
    expected, found = reference.logits_for(ids), made.logits(ids, min(DECODED, len(ids) - 1))
    off = float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())
    if not off < PEER_TOLERANCE[made.dtype_name]:
        cause = f"its logits are off by {off:.3g} of their spread, {PEER_TOLERANCE[made.dtype_name]} are allowed"
        raise SkerryError("check peer", f"torch {made.version}", cause)


def speeds(case: Case) -> dict[str, Any]:
    """Tokens a second of each contestant, as figures."""
    names = {OURS: case.name} | {peer.name: case.peer_key(peer) for peer in case.peers}
    return {
        key: Figure(
            f"{case.label}: {who}", "tok/s", "higher", tuple(case.work / value for value in case.seconds[who])
        ).to_json()
        for who, key in names.items()
        if case.seconds.get(who)
    }


def lines(document: dict[str, Any]) -> list[str]:
    """What was found, for a reader of the terminal."""
    made = document.get("model") or {}
    said = []
    if chat := made.get("chat"):
        said.append(f"chat through {chat['through']}: {chat['prompt']!r} -> {chat['answer']!r}, "
                    f"{chat['tokens']} tokens in {chat['seconds']:.2f} s")  # fmt: skip
    if agreement := made.get("agreement"):
        held = agreement["held_out"]
        said.append(f"agreement with float32: {held['missed']} of {held['positions']} positions differ beyond twice "
                    f"the other texts' error ({held['share']:.1%} of {agreement['positions']} count), mean KL "
                    f"{agreement['mean_kl']:.2g}, top-1 {agreement['top1']:.1%}")  # fmt: skip
    speeds = [figure for name, figure in document["figures"].items() if name.startswith("gpu_model_")]
    said += [f"{one['label']}: {one['median']:.4g} tok/s ({one['min']:.4g} to {one['max']:.4g})" for one in speeds]
    return said
