"""PEFT folders read without torch: names, scales, types of numbers, and folders that would do harm."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import AdapterLayout, AdapterProjection
from skerry.core.errors import IncompatibleError, InputError, NotFound, SkerryError
from skerry.runtime.peft import HEADER_BYTES, read_peft
from skerry.runtime.peft_config import Base
from tests.runtime.peft_folders import CONFIG, random_tensors, write_peft


def layout_of(layers: int = 2) -> AdapterLayout:
    found, at = [], 0
    shapes = {"self_attn.q_proj": (8, 12), "self_attn.k_proj": (8, 4), "self_attn.v_proj": (8, 4),
              "mlp.gate_proj": (8, 16), "mlp.up_proj": (8, 16), "mlp.down_proj": (16, 8)}  # fmt: skip
    for layer in range(layers):
        for name, (inputs, outputs) in shapes.items():
            found.append(AdapterProjection(f"model.layers.{layer}.{name}", inputs, outputs, at, at + inputs))
            at += inputs + outputs
    return AdapterLayout(at, tuple(found))


LAYOUT = layout_of()
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def read(folder: Path, most: int = 8, **options: Any) -> Any:
    return read_peft(folder, "mine", LAYOUT, most, **options)


def pair(module: str, rank: int = 4, inputs: int = 8, outputs: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"{module}.lora_A.weight": rng.normal(size=(rank, inputs)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(size=(outputs, rank)).astype(np.float32),
    }


def test_every_projection_is_found_under_its_name(tmp_path):
    tensors = random_tensors(LAYOUT)
    adapter = read(write_peft(tmp_path / "a", tensors))
    assert set(adapter.deltas) == {one.name for one in LAYOUT.projections} and adapter.rank == 4
    for name, (a, b, scale) in adapter.deltas.items():
        np.testing.assert_array_equal(a, tensors[f"base_model.model.{name}.lora_A.weight"])
        np.testing.assert_array_equal(b, tensors[f"base_model.model.{name}.lora_B.weight"])
        assert scale == 8 / 4


@pytest.mark.parametrize(
    "module",
    [
        f"base_model.model.{Q}", Q, "base_model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj",
        "base_model.model.language_model.model.layers.0.self_attn.q_proj",
    ],
)  # fmt: skip
def test_names_of_models_within_others(tmp_path, module):
    assert set(read(write_peft(tmp_path / "a", pair(module))).deltas) == {Q}


def test_a_fused_matrix_is_split_by_rows(tmp_path):
    at = "base_model.model.model.layers.1"
    tensors = pair(f"{at}.self_attn.qkv_proj", outputs=20) | pair(f"{at}.mlp.gate_up_proj", outputs=32, seed=1)
    deltas = read(write_peft(tmp_path / "a", tensors)).deltas
    for kind, names in (("self_attn.qkv", "q k v"), ("mlp.gate_up", "gate up")):
        parts = [deltas[f"model.layers.1.{kind.split('.')[0]}.{one}_proj"] for one in names.split()]
        np.testing.assert_array_equal(
            np.concatenate([b for _, b, _ in parts]), tensors[f"{at}.{kind}_proj.lora_B.weight"]
        )
        assert all(np.array_equal(a, tensors[f"{at}.{kind}_proj.lora_A.weight"]) for a, _, _ in parts)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0), ({"lora_alpha": 3}, 0.75), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"q_proj": 4}}, 1.0),
        ({"alpha_pattern": {"v_proj": 4}}, 2.0), ({"alpha_pattern": {Q: 12}, "use_rslora": True}, 6.0),
        ({"alpha_pattern": {"^" + Q: 4, "q_proj": 8}}, 1.0), ({"alpha_pattern": {"^q_proj": 4}}, 2.0),
        ({"r": 2, "rank_pattern": {"q_proj": 4}}, 2.0), ({"r": 64, "rank_pattern": {"0.self_attn.q_proj": 4}}, 2.0),
    ],
)  # fmt: skip
def test_scales_are_those_of_peft(tmp_path, changes, scale):
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    assert read(write_peft(tmp_path / "a", pair(Q), **changes)).deltas[Q][2] == pytest.approx(scale)
    config = CONFIG | changes
    alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], Q), config["lora_alpha"])
    rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], Q), config["r"])
    assert scale == pytest.approx(alpha / (rank**0.5 if config["use_rslora"] else rank))


def write_raw(folder: Path, header: Any, data: bytes = b"", config: Any = CONFIG, length: int | None = None) -> Path:
    """A safetensors file by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(raw) if length is None else length)
    (folder / "adapter_model.safetensors").write_bytes(size + raw + data)
    return folder


def entries(kind: str, size: int) -> dict[str, Any]:
    a, b = 4 * 8 * size, 12 * 4 * size
    return {
        f"{Q}.lora_A.weight": {"dtype": kind, "shape": [4, 8], "data_offsets": [0, a]},
        f"{Q}.lora_B.weight": {"dtype": kind, "shape": [12, 4], "data_offsets": [a, a + b]},
    }


def test_halves_and_bfloat16(tmp_path):
    values = np.random.default_rng(0).normal(size=4 * 8 + 12 * 4).astype(np.float32)
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    read_back = (upper.astype(np.uint32) << 16).view(np.float32)
    for kind, raw, wanted in (
        ("F32", values.tobytes(), values), ("F16", values.astype(np.float16).tobytes(), values.astype(np.float16)),
        ("BF16", upper.tobytes(), read_back),
    ):  # fmt: skip
        header = entries(kind, 4 if kind == "F32" else 2)
        a, b, _ = read(write_raw(tmp_path / kind, header, raw)).deltas[Q]
        np.testing.assert_array_equal(np.concatenate([a.ravel(), b.ravel()]), wanted.astype(np.float32))
    assert np.abs(read_back - values).max() < 0.02
    with pytest.raises(IncompatibleError, match=r"q_proj.lora_A.weight is of type F64"):
        read(write_raw(tmp_path / "F64", entries("F64", 8), bytes(640)))


def test_the_digest_is_of_the_content(tmp_path):
    one = read(write_peft(tmp_path / "a", pair(Q))).digest
    assert read(write_peft(tmp_path / "b", pair(Q))).digest == one
    assert read(write_peft(tmp_path / "c", pair(Q, seed=1))).digest != one
    assert read(write_peft(tmp_path / "d", pair(Q), lora_alpha=9)).digest != one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3', only LORA"), ({"peft_type": None}, "peft_type 'None'"),
        ({"use_dora": True}, "use_dora: 'True' is not supported"), ({"bias": "all"}, "bias: 'all'"),
        ({"lora_bias": True}, "lora_bias"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS'"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"use_qalora": True}, "use_qalora"),
        ({"velora_config": {"a": 1}}, "velora_config"), ({"alora_invocation_tokens": [1]}, "alora_invocation"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 0}, "r: '0' is no rank"), ({"r": "4"}, "r: '4'"), ({"r": True}, "r: 'True'"), ({"r": None}, "r: 'None'"),
        ({"r": 10**400}, "r: '1000"),
        ({"lora_alpha": None}, "lora_alpha: 'None'"), ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha: 'nan'"), ({"lora_alpha": float("inf")}, "lora_alpha: 'inf'"),
        ({"use_rslora": "yes"}, "use_rslora"), ({"rank_pattern": [1]}, "rank_pattern: must be an object"),
        ({"rank_pattern": {"(a+)+$": 4}}, r"rank_pattern: the pattern '\(a\+\)\+\$'"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj: 'x'"),
        ({"alpha_pattern": {f"m{i}": 1 for i in range(10_001)}}, "alpha_pattern: must be an object of at most"),
        ({"r": 8}, "has rank 4, and adapter_config.json says 8"), ({"r": 9}, "rank 9, the engine has room for 8"),
        ({"rank_pattern": {"q_proj": 3}}, "has rank 4, and adapter_config.json says 3"),
    ],
)  # fmt: skip
def test_configurations_that_the_engine_cannot_honour(tmp_path, changes, words):
    with pytest.raises(SkerryError, match=words) as caught:
        read(write_peft(tmp_path / "a", pair(Q), **changes))
    assert caught.value.http_status in (400, 409) and str(caught.value).startswith("load adapter mine: ")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensors"),
        (pair("base_model.model.lm_head"), "no room for 'lm_head', only for q_proj, k_proj, v_proj, gate_proj"),
        (pair("base_model.model.model.embed_tokens"), "no room for 'model.embed_tokens'"),
        (pair("model.layers.2.self_attn.q_proj"), "no room for 'model.layers.2.self_attn.q_proj'"),
        (pair("qkv_proj", outputs=20), "no room for 'qkv_proj'"),
        (pair(Q, inputs=9), r"A \[4, 9\] and B \[12, 4\], A \[r, 8\] and B \[12, r\] are wanted"),
        (pair(Q, outputs=4), r"B \[4, 4\]"), (pair(Q, rank=9), "rank 9, the engine has room for 8"),
        (dict([next(iter(pair(Q).items()))]), "has lora_A alone"),
        (pair(Q) | pair(f"base_model.model.{Q}"), "two tensors are lora_"),
        (pair(Q) | pair("layers.0.self_attn.q_proj"), f"two modules are {Q}"),
        (pair(Q) | {f"{Q}.lora_magnitude_vector": np.ones((4, 1), np.float32)}, r"no half of a low-rank pair \(DoRA\)"),
        ({"model.embed_tokens.lora_embedding_A": np.ones((4, 8), np.float32)}, r"\(an adapter of embeddings\)"),
        (pair(Q) | {f"{Q}.lora_B.bias": np.ones((12, 1), np.float32)}, r"\(a bias\)"),
        (pair(Q) | {f"{Q}.weight": np.ones((12, 8), np.float32)}, "no half of a low-rank pair"),
        (pair(Q) | {f"{V}.lora_A.weight": np.ones(8, np.float32)}, r"shape \[8\] is no matrix"),
        ({"x" * 300 + ".lora_A.weight": np.ones((4, 8), np.float32)}, "no half"),
    ],
)  # fmt: skip
def test_tensors_that_the_engine_has_no_place_for(tmp_path, tensors, words):
    with pytest.raises(SkerryError, match=words) as caught:
        read(write_peft(tmp_path / "a", tensors))
    assert caught.value.http_status in (400, 409) and len(str(caught.value)) < 600


HUGE = {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 128]}}
OVERLAP = {
    f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
    f"{Q}.lora_B.weight": {"dtype": "F32", "shape": [12, 4], "data_offsets": [64, 256]},
}


@pytest.mark.faults("weights with hostile headers")
@pytest.mark.parametrize(
    "write",
    [
        lambda at: write_raw(at, entries("F32", 4), bytes(319)),
        lambda at: write_raw(at, entries("F32", 4), bytes(400)),
        lambda at: write_raw(at, HUGE, bytes(128)), lambda at: write_raw(at, OVERLAP, bytes(256)),
        lambda at: write_raw(at, b"{}", length=1 << 63), lambda at: write_raw(at, b"{}", length=HEADER_BYTES),
        lambda at: write_raw(at, b"[" * 100_000), lambda at: write_raw(at, b"\xff\xfe{}"),
        lambda at: write_raw(at, b""),
        lambda at: write_raw(at, {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [-4, 8], "data_offsets": [0, 128]}}),
        lambda at: write_raw(at, {f"{Q}.lora_A.weight": 5}), lambda at: write_raw(at, {}, config=[1]),
    ],
)  # fmt: skip
def test_hostile_weights(tmp_path, write):
    with pytest.raises(InputError, match="load adapter mine"):
        read(write(tmp_path / "a"))


@pytest.mark.faults("an adapter's files cut anywhere")
def test_files_cut_anywhere_are_refused(tmp_path):
    folder = write_peft(tmp_path / "a", pair(Q))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (folder / file).read_bytes()
        for end in (0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1):
            (folder / file).write_bytes(whole[:end])
            with pytest.raises(InputError):
                read(folder)
        (folder / file).write_bytes(whole)
    assert read(folder).rank == 4


@pytest.mark.faults("an adapter's files with bytes flipped")
def test_flipped_bytes_never_crash(tmp_path):
    folder = write_peft(tmp_path / "a", pair(Q))
    path = folder / "adapter_model.safetensors"
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        raw = bytearray(whole)
        raw[rng.integers(header)] = rng.integers(256)
        path.write_bytes(raw)
        try:
            read(folder)
        except SkerryError:
            refused += 1
    assert refused > 200


def test_sizes_are_bounded_before_anything_is_read(tmp_path):
    folder = write_peft(tmp_path / "a", pair(Q))
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(IncompatibleError, match=r"1099511627776 bytes, more than the .* that the engine has room for"):
        read(folder)
    with (folder / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(IncompatibleError, match=r"adapter_config.json has 1099511627776 bytes"):
        read(folder)
    (folder / "adapter_config.json").write_text("[" * 500_000)
    with pytest.raises(InputError, match="not valid JSON"):
        read(folder)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    folder = write_peft(tmp_path / "a", pair(Q))
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no regular file"):
        read(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    with pytest.raises(InputError, match="no regular file"):
        read(folder)


def test_a_pickle_is_refused_and_a_missing_folder_named(tmp_path):
    folder = write_peft(tmp_path / "a", pair(Q))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin is a pickle"):
        read(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(NotFound, match=r"no adapter_model.safetensors in it"):
        read(folder)
    for path in (tmp_path / "none", folder / "adapter_config.json"):
        with pytest.raises(SkerryError, match="load adapter mine"):
            read(path)
    for path in ("a\0b", "a\udc80", "x" * 5000):
        with pytest.raises(SkerryError, match="load adapter mine: "):
            read(Path(path))


def test_links_do_not_lead_out_of_the_directory(tmp_path):
    root, secret = tmp_path / "root", write_peft(tmp_path / "secret", pair(Q))
    root.mkdir()
    inside = write_peft(root / "real", pair(Q))
    (root / "link").symlink_to("real")
    assert read(root / "link", root=root).rank == read(inside, root=root).rank == 4
    (root / "out").symlink_to(secret)
    (root / "files").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "files" / file).symlink_to(secret / file)
    (root / "ring").symlink_to("ring")
    for name in ("out", "files", "../secret", "../none", "real/../../secret"):
        with pytest.raises(InputError, match="lies outside the directory for adapters"):
            read(root / name, root=root)
    with pytest.raises(SkerryError, match="load adapter mine"):
        read(root / "ring", root=root)
    (root / "files" / "adapter_config.json").unlink()
    (root / "files" / "adapter_config.json").write_bytes((inside / "adapter_config.json").read_bytes())
    with pytest.raises(InputError, match=r"adapter_model.safetensors lies outside"):
        read(root / "files", root=root)


@pytest.mark.faults("adapters that do not fit the base")
def test_an_adapter_of_another_base(tmp_path):
    base = Base("a" * 64, "Org/Model-1B")
    for changes in ({}, {"base_model_name_or_path": "org/model-1b"}, {"base_model_name_or_path": "/tmp/somewhere/else"},
                    {"base_model_name_or_path": "sha256:" + "a" * 64}):  # fmt: skip
        assert read(write_peft(tmp_path / "a", pair(Q), **changes), base=base).rank == 4
    for changes, words in (
        ({"base_model_name_or_path": "org/model-3b"}, "made for org/model-3b, the engine is of Org/Model-1B"),
        (
            {"base_model_name_or_path": "sha256:" + "b" * 64},
            "made for checkpoint bbbbbbbbbbbb, the engine is of aaaaaaaaaaaa",
        ),
    ):
        folder = write_peft(tmp_path / "b", pair(Q), **changes)
        with pytest.raises(IncompatibleError, match=words):
            read(folder, base=base)
        assert read(folder).rank == 4  # nothing is recorded, so nothing contradicts


def test_it_needs_no_torch(tmp_path):
    write_peft(tmp_path / "a", pair(Q))
    code = (
        "import sys; from pathlib import Path; from skerry.runtime.peft import read_peft; "
        "from skerry.core.bundle import AdapterLayout, AdapterProjection as P; "
        f"layout = AdapterLayout(20, (P('{Q}', 8, 12, 0, 8),)); "
        f"print(read_peft(Path({str(tmp_path / 'a')!r}), 'a', layout, 8).rank, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4 False\n"
