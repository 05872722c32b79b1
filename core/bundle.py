"""Manifest and bundle: a directory of content-addressed files, and the document that names them all.

`manifest.json` is the TUF target and its exact bytes are what is signed, so a Manifest is only ever read from bytes and
kept with them. The engine digest covers what decides the tokens (graph, weights, tokenizer, template, generation
settings); measured files (parity, baseline, golden) differ between machines and stay outside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skerry.core.errors import BundleError, InputError, NotFound
from skerry.core.files import canonical_json, parse_json, sha256_bytes, write_atomic
from skerry.core.model import ModelSpec
from skerry.core.target import OPS, OPSET, Target

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 << 20
CHUNK_BYTES = 1 << 20
ENGINE_FILES = ("graph.onnx", "weights.bin", "tokenizer.json", "chat_template.jinja", "generation.json")
# Of targets that are compiled, beside those above.
COMPILED_FILES = ("engine.rtx", "engine.json", "build.json", "timing.cache", "engine.plan")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "mixed", "int4", "stored")
MAX_FILES, MAX_FILE_BYTES = 64, 1 << 40
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PROJECTION = ("inputs", "outputs", "down", "up")


@dataclass(frozen=True)
class Chunk:
    sha256: str
    size: int


@dataclass(frozen=True)
class FileEntry:
    """One file; its chunks, CHUNK_BYTES each but the last, are what a node fetches and verifies one by one."""

    name: str
    sha256: str
    size: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class KvGroup:
    """Layers whose KV pages share one block table: same window, heads and head size. Pages hold `page_size` tokens."""

    layers: tuple[int, ...]
    kv_heads: int
    head_size: int
    page_size: int
    dtype: str
    layout: str
    window: int


@dataclass(frozen=True)
class AdapterProjection:
    """A product [outputs, inputs] of the decoder, by the name of its weight without `.weight`, and where in a row of an
    adapter its columns begin: `inputs` of them for down, `outputs` for up."""

    name: str
    inputs: int
    outputs: int
    down: int
    up: int

    @property
    def spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.down, self.down + self.inputs), (self.up, self.up + self.outputs)


@dataclass(frozen=True)
class AdapterLayout:
    """What the graph's input `adapters` [slots, rank, columns] means."""

    columns: int
    projections: tuple[AdapterProjection, ...]


@dataclass(frozen=True)
class Manifest:
    """`adapters`: None, and absent from the document, where the graph takes none; so is `unqualified`, why the engine
    was not measured where it was built, where there is nothing to say."""

    schema: int
    name: str
    version: str
    target: Target
    model: ModelSpec
    precision: str
    kv: tuple[KvGroup, ...]
    max_context: int
    ops: tuple[str, ...]
    files: tuple[FileEntry, ...]
    engine_digest: str
    tokenizer_digest: str
    qualified: bool
    lineage: dict[str, Any]
    adapters: AdapterLayout | None = None
    unqualified: str = ""

    def entry(self, name: str) -> FileEntry:
        for entry in self.files:
            if entry.name == name:
                return entry
        raise NotFound("find file", name, f"not in bundle {self.name} {self.version}")

    @property
    def engine_bytes(self) -> int:
        return sum(entry.size for entry in self.files if entry.name in (*ENGINE_FILES, *COMPILED_FILES))

    def to_bytes(self) -> bytes:
        document = asdict(self)
        document["target"] = {"backend": self.target.backend, "sm": self.target.sm}
        document["model"] = self.model.to_json()
        for name in ("adapters", "unqualified"):
            if not document[name]:
                del document[name]
        return canonical_json(document)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Parses hostile bytes. Raises BundleError; unknown keys are tolerated (a newer publisher)."""
        if len(raw) > MANIFEST_LIMIT:
            raise BundleError("read manifest", "", f"{len(raw)} bytes, more than the {MANIFEST_LIMIT} allowed")
        try:
            document = parse_json(raw, MANIFEST)
            if document["schema"] != 1:
                raise BundleError("read manifest", "", f"schema {document['schema']!r}, this version reads 1")
            manifest = cls(
                schema=1,
                name=_text(document["name"], "name"),
                version=_text(document["version"], "version"),
                target=Target(str(document["target"]["backend"]), _optional_int(document["target"]["sm"])),
                model=ModelSpec.from_json(document["model"]),
                precision=_text(document["precision"], "precision"),
                kv=tuple(_kv_group(group) for group in document["kv"]),
                max_context=_count(document["max_context"], 1 << 31),
                ops=tuple(str(op) for op in document["ops"]),
                files=tuple(_file_entry(entry) for entry in document["files"]),
                engine_digest=_digest(document["engine_digest"]),
                tokenizer_digest=_digest(document["tokenizer_digest"]),
                qualified=bool(document["qualified"]),
                lineage=dict(document["lineage"]),
                adapters=_adapters(document["adapters"]) if "adapters" in document else None,
                unqualified=str(document.get("unqualified", ""))[:500],
            )
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise BundleError("read manifest", "", f"malformed: {error}", "export the bundle again") from error
        names = [entry.name for entry in manifest.files]
        if len(names) > MAX_FILES or len(set(names)) != len(names):
            raise BundleError("read manifest", "", f"{len(names)} files, doubled or more than {MAX_FILES}")
        if engine_digest(manifest.files) != manifest.engine_digest:
            raise BundleError("read manifest", "", "engine digest does not match the files it lists")
        return manifest


def engine_digest(files: tuple[FileEntry, ...]) -> str:
    """Digest over (name, sha256) of the engine files that are there, sorted by name."""
    decisive = (*ENGINE_FILES, *COMPILED_FILES)
    return sha256_bytes(canonical_json(sorted([f.name, f.sha256] for f in files if f.name in decisive)))


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{field} {value!r} is not a plain name")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{value!r} is no sha256")
    return value


def _count(value: Any, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ValueError(f"{value!r} is not a count up to {limit}")
    return value


def _optional_int(value: Any) -> int | None:
    return None if value is None else _count(value, 999)


def _kv_group(raw: Any) -> KvGroup:
    return KvGroup(
        layers=tuple(_count(layer, 4096) for layer in raw["layers"]), kv_heads=_count(raw["kv_heads"], 4096),
        head_size=_count(raw["head_size"], 4096), page_size=_count(raw["page_size"], 4096),
        dtype=_text(raw["dtype"], "dtype"), layout=_text(raw["layout"], "layout"),
        window=_count(raw["window"], 1 << 31),
    )  # fmt: skip


def _adapters(raw: Any) -> AdapterLayout:
    columns = _count(raw["columns"], 1 << 31)
    projections = tuple(
        AdapterProjection(_text(one["name"], "projection"), *(_count(one[key], columns) for key in _PROJECTION))
        for one in raw["projections"]
    )
    if len({one.name for one in projections}) != len(projections):
        raise ValueError("two adapter projections of one name")
    end = 0
    for first, last in sorted(span for one in projections for span in one.spans):
        if first < end or last > columns:
            raise ValueError(f"adapter columns {first} to {last} overlap others or are beyond {columns}")
        end = last
    return AdapterLayout(columns, projections)


def _file_entry(raw: Any) -> FileEntry:
    name, size = _text(raw["name"], "file name"), _count(raw["size"], MAX_FILE_BYTES)
    chunks = tuple(Chunk(_digest(chunk["sha256"]), _count(chunk["size"], CHUNK_BYTES)) for chunk in raw["chunks"])
    if sum(chunk.size for chunk in chunks) != size or any(chunk.size != CHUNK_BYTES for chunk in chunks[:-1]):
        raise ValueError(f"chunks of {name} do not add up to {size} bytes")
    return FileEntry(name, _digest(raw["sha256"]), size, chunks)


@dataclass(frozen=True)
class Bundle:
    """A directory whose manifest has been read; its digest is that of the manifest's exact bytes."""

    path: Path
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def digest(self) -> str:
        return sha256_bytes(self.manifest_bytes)

    @property
    def short(self) -> str:
        return self.digest[:12]

    def file(self, name: str) -> Path:
        self.manifest.entry(name)
        return self.path / name


def describe_file(path: Path) -> FileEntry:
    """Digests a file and its chunks in one read."""
    import hashlib

    whole, chunks = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            whole.update(block)
            chunks.append(Chunk(sha256_bytes(block), len(block)))
    return FileEntry(path.name, whole.hexdigest(), sum(chunk.size for chunk in chunks), tuple(chunks))


def seal(
    path: Path | str,
    *,
    name: str,
    version: str,
    target: Target,
    model: ModelSpec,
    precision: str,
    kv: tuple[KvGroup, ...],
    max_context: int,
    ops: tuple[str, ...] = OPS,
    qualified: bool = True,
    lineage: dict[str, Any],
    adapters: AdapterLayout | None = None,
    unqualified: str = "",
) -> Bundle:
    """Digests every file of a finished directory and writes its manifest last. Raises BundleError (a file missing)."""
    path = Path(path)
    files = tuple(describe_file(f) for f in sorted(path.iterdir()) if f.is_file() and f.name != MANIFEST)
    missing = sorted(set(ENGINE_FILES) - {entry.name for entry in files})
    if missing:
        raise BundleError("seal bundle", path, f"missing {', '.join(missing)}")
    tokenizer = next(entry.sha256 for entry in files if entry.name == "tokenizer.json")
    manifest = Manifest(
        schema=1, name=name, version=version, target=target, model=model, precision=precision, kv=kv,
        max_context=max_context, ops=tuple(sorted(ops)), files=files, engine_digest=engine_digest(files),
        tokenizer_digest=tokenizer, qualified=qualified, lineage=lineage, adapters=adapters,
        unqualified=unqualified,
    )  # fmt: skip
    raw = manifest.to_bytes()
    Manifest.from_bytes(raw)  # nothing is sealed that would not be read back
    write_atomic(path / MANIFEST, raw)
    return Bundle(path, manifest, raw)


def read_manifest(path: Path | str) -> Bundle:
    """The bundle with its manifest parsed and its files not looked at."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise BundleError("open bundle", path, f"no {MANIFEST} in it", "point at a directory made by skerry export")
    if (path / MANIFEST).stat().st_size > MANIFEST_LIMIT:
        raise BundleError("open bundle", path, f"{MANIFEST} is larger than {MANIFEST_LIMIT} bytes")
    raw = (path / MANIFEST).read_bytes()
    try:
        return Bundle(path, Manifest.from_bytes(raw), raw)
    except BundleError as error:
        raise BundleError("open bundle", path, error.cause, error.hint or "export or fetch it again") from error


def open_bundle(path: Path | str, verify: bool = True) -> Bundle:
    """Raises BundleError with the first problem; `verify=False` trusts the disk (sizes are still checked)."""
    bundle = read_manifest(path)
    problem = next(_problems(bundle, deep=verify), None)
    if problem:
        raise BundleError("verify bundle", bundle.short, problem, f"skerry bundle verify {path}")
    return bundle


def find_problems(path: Path | str) -> list[str]:
    """Everything that is wrong with the bundle at `path` (a directory or a packed file), in words; empty when sound."""
    import tempfile

    from skerry.core.packing import unpack

    path = Path(path)
    try:
        if path.is_dir():
            bundle = read_manifest(path)
            return [*_problems(bundle, deep=True), *graph_problems(bundle)]
        with tempfile.TemporaryDirectory() as scratch:
            return list(graph_problems(unpack(path, Path(scratch) / "bundle")))
    except BundleError as error:
        return [error.cause]


def _problems(bundle: Bundle, deep: bool) -> Iterator[str]:
    listed = {entry.name for entry in bundle.manifest.files}
    yield from (f"{name} is not listed in the manifest" for name in ENGINE_FILES if name not in listed)
    unknown = sorted(set(bundle.manifest.ops) - set(OPS))
    if unknown:
        yield f"its graph uses unknown ops: {', '.join(unknown)}"
    for entry in bundle.manifest.files:
        path = bundle.path / entry.name
        if path.is_symlink() or not path.is_file():
            yield f"{entry.name} is missing"
        elif path.stat().st_size != entry.size:
            yield f"{entry.name} has {path.stat().st_size} bytes, the manifest says {entry.size}"
        elif deep and (found := describe_file(path)).sha256 != entry.sha256:
            chunk = next(i for i, (a, b) in enumerate(zip(found.chunks, entry.chunks)) if a != b)
            yield f"{entry.name} sha256 differs (first in chunk {chunk})"
        elif deep and found.chunks != entry.chunks:
            yield f"{entry.name} chunk digests differ from its own digest"
    strays = sorted(f.name for f in bundle.path.iterdir() if f.name not in listed | {MANIFEST})
    if strays:
        yield f"files the manifest does not list: {', '.join(strays[:5])}"


def graph_problems(bundle: Bundle) -> Iterator[str]:
    """What the graph itself uses that is unknown here, whatever its manifest says: ops, or a later version of ours.

    A file that is no graph is left to whoever loads it.
    """
    from skerry.core.graph_ops import custom_ops, opset_version

    graph = bundle.path / "graph.onnx"
    if not graph.is_file():
        return
    told = {op.rpartition(":")[0] for op in (*OPS, *bundle.manifest.ops)}
    try:
        unknown, version = sorted(custom_ops(graph) - told), opset_version(graph, "skerry")
    except ValueError:
        return
    if unknown:
        yield f"graph.onnx uses unknown ops its manifest does not tell of: {', '.join(unknown[:5])}"
    if version is not None and version > OPSET:
        yield f"graph.onnx is written for version {version} of skerry's ops, this version has {OPSET}"
