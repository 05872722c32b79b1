"""Tokenizer files, templates and generation settings from the many places checkpoints keep them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from skerry.core.chat import ChatTemplate, encode_row
from skerry.core.errors import InputError
from skerry.core.tokenizer import Tokenizer
from skerry.exporter.baseline import NEW_TOKENS
from skerry.exporter.engine import generate
from skerry.exporter.subject import open_subject, plain_name, write_text_files
from skerry.exporter.texts import encode_rows, open_texts, read_rows

Make = Callable[..., Path]


def _written(path: Path, out: Path) -> dict[str, object]:
    out.mkdir()
    return write_text_files(open_subject(path), out)


def test_sampling_settings_only_where_the_checkpoint_samples(make_model: Make, tmp_path: Path) -> None:
    path = make_model()
    config = {"eos_token_id": [3, 257], "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    (path / "generation_config.json").write_text(json.dumps(config))
    greedy = _written(path, tmp_path / "a")
    assert greedy["eos_token_ids"] == [3, 257] and (greedy["temperature"], greedy["top_k"]) == (0.0, 0)
    (path / "generation_config.json").write_text(json.dumps({**config, "do_sample": True}))
    sampled = _written(path, tmp_path / "b")
    assert (sampled["temperature"], sampled["top_p"], sampled["top_k"]) == (0.6, 0.9, 20)


def test_template_from_tokenizer_config_or_the_plain_one(make_model: Make, tmp_path: Path) -> None:
    path = make_model()
    (path / "chat_template.jinja").unlink()
    _written(path, tmp_path / "plain")
    template = ChatTemplate.open(tmp_path / "plain", eos_token="<|im_end|>")
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    ids, start = encode_row(row, Tokenizer.open(tmp_path / "plain"), template)
    assert Tokenizer.open(tmp_path / "plain").decode(ids[start:]) == "ho\n"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named, "eos_token": {"content": "<|im_end|>"}})
    )
    settings = _written(path, tmp_path / "named")
    assert (tmp_path / "named" / "chat_template.jinja").read_text() == "D" and settings["eos_token"] == "<|im_end|>"


def test_no_tokenizer(make_model: Make, tmp_path: Path) -> None:
    path = make_model()
    (path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        _written(path, tmp_path / "out")


def test_an_unsealed_directory_is_known_by_its_files(make_model: Make) -> None:
    path = make_model(name="My Model!")
    subject = open_subject(path)
    assert subject.name == "My-Model" and len(subject.digest) == 64 and subject.parity_nll is None
    assert set(subject.lineage["imported"]) == {"config.json", "model.safetensors"}
    assert open_subject(path).digest == subject.digest


def test_names() -> None:
    assert plain_name("..//a b") == "a-b" and plain_name("///") == "model"


def test_packaged_texts_are_complete() -> None:
    texts = open_texts(None, None)
    assert (
        texts.origin == "packaged" and len(texts.parity) >= 30 and len(texts.baseline) >= 96 and len(texts.golden) >= 4
    )
    assert all(row["messages"][-1]["role"] == "assistant" for row in texts.parity)
    assert all(row["messages"][-1]["role"] == "user" for row in texts.golden + texts.baseline)


def test_own_texts_come_before_the_packaged_and_after_the_callers(make_model: Make, tmp_path: Path) -> None:
    path = make_model()
    assert open_texts(path, None).origin == "checkpoint" and len(open_texts(path, None).parity) == 12
    (path / "eval" / "golden.jsonl").unlink()
    assert len(open_texts(path, None).golden) == 4
    assert open_texts(path, path / "eval").origin == "caller"
    with pytest.raises(InputError, match="no such directory"):
        open_texts(path, tmp_path / "absent")
    (path / "eval" / "parity.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        open_texts(path, None)


def test_rows_beyond_the_context_are_left_out(make_model: Make, tmp_path: Path) -> None:
    path = make_model()
    tokenizer, template = Tokenizer.open(path), ChatTemplate.open(path)
    rows = read_rows(path / "eval" / "parity.jsonl")
    lengths = [len(ids) for ids, _ in encode_rows(rows, tokenizer, template, 512)]
    limit = sorted(lengths)[5]
    assert [len(ids) for ids, _ in encode_rows(rows, tokenizer, template, limit)] == [n for n in lengths if n <= limit]
    with pytest.raises(InputError, match="none fits"):
        encode_rows(rows, tokenizer, template, 10)


def test_generated_text_does_not_depend_on_the_batch(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skerry.core.target import Target
    from skerry.exporter.export import Options, export
    from skerry.kernels.runner import Runner

    bundle = export(make_model(), Target("ort-cpu"), "fp32", tmp_path / "out", Options(threads=1, skip_baseline=True))
    settings = {"eos_token_ids": [], "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    prompts = [[256, 72 + i, 101, *range(40, 44 + i)] for i in range(9)]
    with Runner.open(bundle, threads=1, pages=120) as runner:
        together = generate(runner, prompts, NEW_TOKENS, settings)
        monkeypatch.setattr("skerry.exporter.engine.BATCH", 1)
        alone = generate(runner, prompts, NEW_TOKENS, settings)
        stopped = generate(runner, prompts[:1], NEW_TOKENS, {**settings, "eos_token_ids": [alone[0].ids[4]]})
    assert [a.ids for a in alone] == [t.ids for t in together]
    assert all(len(a.ids) == len(a.surprise) == len(a.entropy) == NEW_TOKENS for a in alone)
    assert stopped[0].ids == alone[0].ids[: alone[0].ids.index(alone[0].ids[4]) + 1]
