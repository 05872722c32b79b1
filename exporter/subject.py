"""What is exported: weights, shape, lineage, tokenizer files and generation settings of one checkpoint."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError
from skerry.core.files import canonical_json, read_json, sha256_file
from skerry.core.model import LINEAGE, Checkpoint, ModelSpec
from skerry.exporter.architectures import decoder_of, source_of
from skerry.exporter.blocks import Decoder
from skerry.exporter.gguf_source import GgufSource
from skerry.exporter.heads import PaddedSource, Padding
from skerry.exporter.weights import Source, check_names, open_source

PLAIN_TEMPLATE = Path(__file__).parent / "data" / "plain_chat.jinja"
# Below this many parameters 4-bit weights lose too much (measured: see DESIGN.md).
INT4_FROM = 300_000_000


@dataclass(frozen=True)
class Subject:
    """`stored` has the weights as the file means them, `source` as the blocks do. `lineage` is the checkpoint's own, or
    a stub that names the file it was imported from. `padding`: what `with_heads` did to source and decoder."""

    stored: Source
    source: Source
    spec: ModelSpec
    decoder: Decoder
    lineage: dict[str, Any]
    digest: str
    padding: Padding | None = None

    @property
    def directory(self) -> Path | None:
        return self.source.path if self.source.path.is_dir() else None

    @property
    def parity_nll(self) -> float | None:
        recorded = (self.lineage.get("eval") or {}).get("parity_nll")
        return None if recorded is None else float(recorded)

    def precision(self, asked: str, blocks: bool = True) -> str:
        """`auto`: a GGUF's `blocks` as they are, if the target reads all formats, else 8 bits for a small model and 4
        for others. Raises InputError for `stored` where nothing is stored in blocks."""
        if asked == "stored" and not isinstance(self.stored, GgufSource):
            raise InputError("export as stored", self.source.path, "only a GGUF holds blocks", "--precision int8")
        if asked != "auto":
            return asked
        if blocks and all(self.source.in_blocks(dense.weight) for dense in self.decoder.denses()):
            return "stored"
        return "int8" if self.spec.parameters < INT4_FROM else "int4"

    def with_heads(self, size: int) -> Subject:
        """With source and decoder as an engine with heads of `size` has them; `spec` and `stored` are the model's."""
        if size == self.spec.head_size:
            return self
        padding = Padding.of(self.decoder, self.spec.head_size, size)
        source = PaddedSource(self.source, padding)
        return replace(self, source=source, decoder=padding.decoder(self.decoder), padding=padding)

    @property
    def name(self) -> str:
        return plain_name(str(self.lineage.get("name") or self.source.path.stem))


def plain_name(text: str) -> str:
    """As manifests want names: letters, digits, dot, dash, underscore."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "model"


def open_subject(path: Path, max_context: int | None = None) -> Subject:
    """Raises InputError: no such thing, damaged files, unknown architecture, tensors missing or left over."""
    if path.is_dir() and (path / LINEAGE).is_file():
        checkpoint = Checkpoint.open(path)
        lineage, digest = checkpoint.lineage, checkpoint.digest
    else:
        lineage, digest = {}, ""
    stored = open_source(path)
    spec = _shortened(ModelSpec.from_hf_config(stored.config), max_context)
    decoder, source = decoder_of(spec, stored.config), source_of(stored, spec)
    check_names(source, decoder.shapes(spec.vocab_size, spec.hidden_size, spec.head_size), spec.tied_embeddings)
    if not digest:
        files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
        lineage = {"name": plain_name(path.stem), "imported": {file.name: sha256_file(file) for file in files}}
        digest = sha256_of(lineage)
    return Subject(stored, source, spec, decoder, lineage, digest)


def sha256_of(document: Any) -> str:
    from skerry.core.files import sha256_bytes

    return sha256_bytes(canonical_json(document))


def _shortened(spec: ModelSpec, max_context: int | None) -> ModelSpec:
    if max_context is None:
        return spec
    if not 16 <= max_context <= spec.max_context:
        raise InputError(
            "limit context",
            str(max_context),
            f"not between 16 and the model's {spec.max_context}",
            "--max-context within it",
        )
    return replace(spec, max_context=max_context)


def write_text_files(subject: Subject, out: Path) -> dict[str, Any]:
    """tokenizer.json, chat_template.jinja and generation.json; returns the last one's content."""
    if isinstance(subject.stored, GgufSource):
        subject.stored.save_tokenizer(out)
    else:
        _copy_tokenizer(subject.source.path, out)
    if not (out / "chat_template.jinja").is_file():
        shutil.copyfile(PLAIN_TEMPLATE, out / "chat_template.jinja")
    settings = generation_settings(subject, out)
    (out / "generation.json").write_bytes(canonical_json(settings) + b"\n")
    return settings


def _copy_tokenizer(directory: Path, out: Path) -> None:
    if not (directory / "tokenizer.json").is_file():
        raise InputError("read tokenizer", directory, "no tokenizer.json in it", "save the tokenizer in its fast form")
    shutil.copyfile(directory / "tokenizer.json", out / "tokenizer.json")
    if (directory / "chat_template.jinja").is_file():
        shutil.copyfile(directory / "chat_template.jinja", out / "chat_template.jinja")
    elif (directory / "tokenizer_config.json").is_file():
        template = read_json(directory / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several named templates: the default one is for chat
            template = next((item.get("template") for item in template if item.get("name") == "default"), None)
        if isinstance(template, str):
            (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def generation_settings(subject: Subject, out: Path) -> dict[str, Any]:
    """Sampling defaults of the checkpoint; greedy where it names none. Special tokens by their text, for templates."""
    from skerry.core.tokenizer import Tokenizer

    directory = subject.directory
    path = directory / "generation_config.json" if directory else None
    raw = read_json(path) if path is not None and path.is_file() else {}
    tokenizer, spec = Tokenizer.open(out), subject.spec
    eos = raw.get("eos_token_id", list(spec.eos_token_ids))
    eos_ids = sorted({*(eos if isinstance(eos, list) else [eos]), *spec.eos_token_ids} - {None})
    sampled = bool(raw.get("do_sample", False))
    return {
        "eos_token_ids": eos_ids,
        "bos_token": _special(directory, tokenizer, "bos_token", spec.bos_token_id),
        "eos_token": _special(directory, tokenizer, "eos_token", spec.eos_token_ids[0] if spec.eos_token_ids else None),
        "temperature": float(raw.get("temperature") or 1.0) if sampled else 0.0,
        "top_p": float(raw.get("top_p") or 1.0) if sampled else 1.0,
        "top_k": int(raw.get("top_k") or 0) if sampled else 0,
        "max_context": spec.max_context,
    }


def _special(directory: Path | None, tokenizer: Any, key: str, token_id: int | None) -> str:
    """The token's text: as tokenizer_config.json says (a string or an AddedToken), else by its id."""
    path = directory / "tokenizer_config.json" if directory else None
    value = read_json(path).get(key) if path is not None and path.is_file() else None
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, str):
        return value
    return str(tokenizer.inner.id_to_token(token_id) or "") if token_id is not None else ""
