"""ModelSpec: the shape of a model; Checkpoint: trained weights in a directory, with their lineage."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError
from skerry.core.files import canonical_json, read_json, sha256_bytes, sha256_file, write_json
from skerry.core.hf_config import MOST_COUNT, HfConfig, full_rope, shown

# Hugging Face's architecture names and the family that emits them.
FAMILIES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral", "Phi3ForCausalLM": "phi3", "SmolLM3ForCausalLM": "smollm3",
    "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "GraniteForCausalLM": "granite",
}  # fmt: skip
# Families whose `sliding_window` counts without a `use_sliding_window` beside it.
SLIDING = ("mistral", "phi3", "gemma2", "gemma3")
# What config.json may leave out, where the family's value is not everybody's.
TIED = ("gemma2", "gemma3")
THETAS = {"gemma3": 1_000_000.0}
# Models of more than text, by the architecture of their text. transformers writes only what differs from these.
TEXT_OF = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
GEMMA3_TEXT = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "sliding_window": 4096, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
LINEAGE = "checkpoint.json"
# Beyond every model there is; a file that claims more would cost memory and time before anything else refuses it.
MOST = {"layers": 4096, "heads": 4096, "kv_heads": 4096, "head_size": 4096}
_SIZES = ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_size", "intermediate_size", "max_context")
HEX_DIGITS = frozenset("0123456789abcdef")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model alone, where the checkpoint holds more (Gemma 3 reads images too)."""
    name = _architecture(config)
    if name not in TEXT_OF:
        return config
    own = HfConfig(config).part("text_config").fields
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    return {**GEMMA3_TEXT, **own, **special, "architectures": [TEXT_OF[name]]}


@dataclass(frozen=True)
class ModelSpec:
    """Sizes are counts of elements; `window` is the sliding attention window in tokens, 0 for none.

    Where only some layers have the window, or turn by other angles (Gemma), `window` is theirs and `rope_theta` and
    `rope_scaling` are those of the layers that see everything.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    max_context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tied_embeddings: bool
    qkv_bias: bool
    window: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> ModelSpec:
        """Reads a Hugging Face `config.json`, both the transformers 5 form (`rope_parameters`) and the older one.
        Raises InputError that names the field which is missing or like no model's."""
        config = text_config(config)
        name = _architecture(config)
        family = FAMILIES.get(name)
        if family is None:
            known = ", ".join(sorted({**FAMILIES, **TEXT_OF}))
            raise InputError("read model config", name, "unknown architecture", f"one of {known}")
        read = HfConfig(config)
        rope = full_rope(read)
        heads, hidden = read.count("num_attention_heads", most=MOST["heads"]), read.count("hidden_size")
        windowed = read.flag("use_sliding_window", family in SLIDING)
        spec = cls(
            family=family,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            layers=read.count("num_hidden_layers", most=MOST["layers"]),
            heads=heads,
            kv_heads=read.count("num_key_value_heads", heads, most=MOST["kv_heads"]),
            head_size=read.count("head_dim", hidden // heads, most=MOST["head_size"]),
            intermediate_size=read.count("intermediate_size"),
            max_context=read.count("max_position_embeddings"),
            norm_eps=read.real("rms_norm_eps", zero=True),
            rope_theta=rope.real("rope_theta", read.real("rope_theta", THETAS.get(family, 10000.0))),
            rope_scaling=_rope_scaling(read),
            tied_embeddings=read.flag("tie_word_embeddings", family in TIED),
            qkv_bias=family == "qwen2" or read.flag("attention_bias"),
            window=read.count("sliding_window", 0, least=0) if windowed else 0,
            bos_token_id=read.count("bos_token_id", least=0) if read.has("bos_token_id") else None,
            eos_token_ids=read.ids("eos_token_id"),
        )
        if spec.heads % spec.kv_heads:
            cause = f"{spec.heads} heads over {spec.kv_heads} KV heads"
            raise InputError("read model config", "num_key_value_heads", cause, "correct config.json")
        if spec.head_size % 2:
            cause = f"{spec.head_size} is odd, and rotary embedding turns pairs"
            raise InputError("read model config", "head_dim", cause, "correct config.json")
        return spec

    def _check_sizes(self) -> None:
        """Raises InputError that names the first size which no model has."""
        for name in _SIZES:
            size, most = getattr(self, name), MOST.get(name, MOST_COUNT)
            if type(size) is not int or not 1 <= size <= most:
                raise InputError("read model spec", name, f"out of range: {shown(size)}, not 1 to {most}")
        if self.heads % self.kv_heads:
            cause = f"impossible shape: {self.heads} heads over {self.kv_heads} KV heads"
            raise InputError("read model spec", "heads", cause)

    @property
    def parameters(self) -> int:
        """Weights of the matrices (norms and biases are left out: well below 1%)."""
        attention = self.hidden_size * self.head_size * 2 * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.layers * (attention + mlp) + embeddings

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json(cls, raw: Any) -> ModelSpec:
        try:
            known = {name: raw[name] for name in cls.__dataclass_fields__}
            spec = cls(**{**known, "eos_token_ids": tuple(int(token) for token in raw["eos_token_ids"])})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError("read model spec", "", f"missing or malformed field {error}") from error
        spec._check_sizes()
        return spec


def _architecture(config: dict[str, Any]) -> str:
    if not isinstance(config, dict):
        raise InputError("read model config", "config.json", f"{shown(config)} is not an object", "correct config.json")
    names = HfConfig(config).items("architectures", "names", str)
    return str(names[0]) if names else "missing"


def _rope_scaling(config: HfConfig) -> dict[str, Any] | None:
    """In the older form an object of its own, in transformers 5 a part of `rope_parameters`."""
    old, rope = config.part("rope_scaling").fields, full_rope(config)
    return dict(old) or (dict(rope.fields) if rope.text("rope_type", "default") != "default" else None)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory sealed by `checkpoint.json`: what it came from and the digest of every file.

    Lineage keys: schema, name, version, parent (digest or null), dataset {id, digest} or null, recipe, seed, versions,
    eval {nll {slice: nats per answer token}, parity_nll}, files {name: sha256}.
    """

    path: Path
    spec: ModelSpec
    lineage: dict[str, Any]
    digest: str

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> Checkpoint:
        """Raises InputError when the directory is no checkpoint or a file is not what the lineage says."""
        path = Path(path)
        lineage = read_json(path / LINEAGE)
        files = lineage.get("files") if isinstance(lineage, dict) else None
        if not isinstance(files, dict) or "config.json" not in files:
            raise InputError("open checkpoint", path, f"{LINEAGE} lists no files", "train or import it again")
        for name, expected in files.items() if verify else ():
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise InputError("open checkpoint", path, f"unsafe file name {name!r}")
            if not (path / name).is_file():
                raise InputError("open checkpoint", path, f"{name} is missing")
            if sha256_file(path / name) != expected:
                raise InputError("open checkpoint", path, f"{name} sha256 differs from {LINEAGE}")
        spec = ModelSpec.from_hf_config(read_json(path / "config.json"))
        return cls(path, spec, lineage, sha256_bytes(canonical_json(lineage)))


def write_lineage(path: Path | str, lineage: dict[str, Any]) -> Checkpoint:
    """Seals a finished directory: digests every file under it and writes `checkpoint.json` last."""
    path = Path(path)
    files = {
        str(file.relative_to(path)): sha256_file(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != LINEAGE and not file.name.startswith(".")
    }
    write_json(path / LINEAGE, {"schema": 1, **lineage, "files": files})
    return Checkpoint.open(path, verify=False)
