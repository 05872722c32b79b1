"""Where a bundle came from: recipe for the manifest, a model card for people, a CycloneDX list of components."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from skerry.core.files import sha256_file
from skerry.exporter.gate import LIMITS
from skerry.exporter.parity import Parity
from skerry.exporter.subject import Subject
from skerry.exporter.texts import Texts
from skerry.kernels.blocks import BLOCK

# What made the engine, and what runs it on a node; licences are those of the projects.
BUILD = ("onnx", "onnx-ir", "numpy", "safetensors", "gguf", "torch", "transformers", "tokenizers")
RUN = ("onnxruntime", "tokenizers", "numpy", "jinja2")
RUN_ON = {
    "ort-cuda": ("onnxruntime-gpu", "cupy-cuda13x"), "tensorrt": ("onnxruntime-gpu", "cupy-cuda13x", "tensorrt"),
    "tensorrt-rtx": ("cupy-cuda13x", "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"),
}  # fmt: skip


def recipe(
    subject: Subject,
    precision: str,
    target: str,
    rules: dict[str, int],
    formats: dict[str, int],
    rounded: dict[str, Any],
) -> dict[str, Any]:
    """How to make the same engine again, with the versions of tools. They may change an engine's bytes only where
    `rounded` names a calibration: its sums are the libraries', the same on one machine with as many threads."""
    quantization = {"block": BLOCK, "matrices": formats, **rounded} if formats else {}
    return {
        "target": target, "precision": precision, "max_context": subject.spec.max_context,
        "quantization": quantization, "rules": rules, "versions": versions(BUILD),
    }  # fmt: skip


def lineage(subject: Subject, made: dict[str, Any], texts: Texts) -> dict[str, Any]:
    """The manifest's lineage: the checkpoint by digest, its own lineage without the file list, and the recipe."""
    own = {key: value for key, value in subject.lineage.items() if key != "files"}
    return {"checkpoint": subject.digest, "training": own, "recipe": made, "texts": texts.digests}


def versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {"skerry": _version("skerry"), **{name: _version(name) for name in names}}
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def sbom(subject: Subject, name: str, version: str, weights: Path, backend: str) -> dict[str, Any]:
    """CycloneDX 1.6: the model as the subject, the packages that built and that run it as components, as far as they
    are installed here. No timestamp and no serial number: the same export gives the same document."""
    run = (*RUN, *RUN_ON.get(backend, ()))
    components = [_component(package) for package in sorted({*BUILD, *run, "skerry"}) if _version(package)]
    model = {
        "type": "machine-learning-model", "bom-ref": f"model:{name}@{version}", "name": name, "version": version,
        "hashes": [{"alg": "SHA-256", "content": sha256_file(weights)}],
        "modelCard": {"modelParameters": {"architectureFamily": subject.spec.family, "task": "text-generation"}},
    }  # fmt: skip
    needed = [f"pkg:pypi/{package}@{_version(package)}" for package in sorted(run) if _version(package)]
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {"component": model}, "components": components,
        "dependencies": [{"ref": model["bom-ref"], "dependsOn": needed}],
    }  # fmt: skip


def _component(package: str) -> dict[str, Any]:
    described, version = metadata.metadata(package), _version(package)
    purl = f"pkg:pypi/{package}@{version}"
    found: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": package, "version": version, "purl": purl}
    licence = described.json.get("license_expression", "")
    if licence:
        found["licenses"] = [{"expression": licence}]
    return found


def model_card(
    subject: Subject,
    name: str,
    version: str,
    precision: str,
    parity: Parity | None,
    found: list[str],
    texts: Texts,
    unqualified: str = "",
    padded: str = "",
) -> str:
    """Markdown for a person who must decide whether to run this."""
    spec, own = subject.spec, subject.lineage
    dataset = own.get("dataset") or {}
    measured = "\n".join(
        f"- {slice_name}: {value:.4f} nats per answer token"
        for slice_name, value in sorted(((own.get("eval") or {}).get("nll") or {}).items())
    )
    shape = (
        f"{spec.family} decoder, {spec.layers} layers, {spec.parameters / 1e6:.0f}M parameters, {precision} weights."
        + (f" {padded}" if padded else "")
    )
    return f"""# {name} {version}

{shape}

## Quality of this engine against its float32 checkpoint

{_quality(precision, parity, found, texts, unqualified)}

## Origin

- checkpoint {subject.digest[:12]} ({own.get("name", name)}), parent {str(own.get("parent") or "none")[:12]}
- training data: {dataset.get("id", "none recorded")} ({str(dataset.get("digest", ""))[:12]})
{measured}

## Limits

Sequences of up to {spec.max_context} tokens. A small language model: it states falsehoods fluently. Drift of the
traffic is watched against `baseline.json`.
"""


def _quality(precision: str, parity: Parity | None, found: list[str], texts: Texts, unqualified: str) -> str:
    """The figures beside their limits, or that there are none: a bundle for measuring speed says so."""
    if unqualified and parity is None:
        return f"NOT MEASURED: it could not be run where it was built ({unqualified}). The bundle is unqualified."
    if parity is None:
        return "NOT MEASURED, by request. What it answers may be anything; the bundle is not qualified to be published."
    limits, verdict = LIMITS[precision], "passed" if not found else "REFUSED: " + "; ".join(found)
    compiled = (
        f"\n\nThe compiled engine is NOT MEASURED ({unqualified}): the bundle is unqualified." if unqualified else ""
    )
    return f"""| measure | this engine | limit |
|---|---|---|
| perplexity ratio | {parity.ppl_ratio:.4f} | {limits.ppl_ratio} |
| mean KL (nats) | {parity.kl:.5f} | {limits.kl} |
| top-1 agreement | {parity.top1:.2%} | {limits.top1:.1%} |

Measured on {parity.tokens} answer tokens of {parity.rows} rows ({texts.origin} text). Gate: {verdict}.{compiled}"""
