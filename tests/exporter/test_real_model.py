"""SmolLM2-135M from its GGUF: what transformers reads, what the engine answers, how far int8 is from float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from skerry.core.bundle import Bundle
from skerry.core.chat import encode_prompt
from skerry.core.target import Target
from skerry.exporter.export import Options, build_engine, open_texts_files, seal_engine
from skerry.exporter.subject import open_subject
from skerry.exporter.texts import encode_rows, open_texts

pytestmark = pytest.mark.slow
CPU = Target("ort-cpu")


def test_paris(smollm2: Bundle) -> None:
    from skerry.core.files import read_json
    from skerry.exporter.engine import generate, open_runner

    settings = read_json(smollm2.path / "generation.json")
    tokenizer, template = open_texts_files(smollm2.path, settings)
    system = {"role": "system", "content": "You are a helpful assistant."}
    chat = encode_prompt([system, {"role": "user", "content": "The capital of France is"}], tokenizer, template)
    with open_runner(smollm2, None, 512) as runner:
        answer, completion = generate(runner, [chat, tokenizer.encode("The capital of France is")], 24, settings)
    assert tokenizer.decode(answer.ids) == "The capital of France is Paris."
    assert answer.ids[-1] in settings["eos_token_ids"]
    assert tokenizer.decode(completion.ids).startswith(" Paris")


def test_the_files_own_blocks_lose_nothing_but_what_activations_cost(gguf: Path, tmp_path: Path) -> None:
    """`auto` takes a GGUF as it is: Q4_1 and a Q8_0 head. Teacher-forced against the dequantized weights."""
    from skerry.core.files import read_json
    from skerry.exporter.engine import open_runner
    from skerry.exporter.parity import measure
    from skerry.exporter.reference import load_reference

    subject, options = open_subject(gguf), Options()
    built = build_engine(subject, CPU, "auto", tmp_path, options.progress)
    assert built.precision == "stored" and built.formats == {"Q4_1": 210, "Q8_0": 1}
    texts = open_texts(None, None)
    bundle = seal_engine(subject, texts, built, CPU, tmp_path, options, qualified=False)
    tokenizer, template = open_texts_files(tmp_path, read_json(tmp_path / "generation.json"))
    rows = encode_rows(texts.parity[:8], tokenizer, template, 2048)
    with open_runner(bundle, None, 512) as runner:
        parity = measure(load_reference(subject.stored), [runner], rows, lambda stage, done, total: None)[0]
    assert parity.ppl_ratio < 1.015 and parity.kl < 0.006 and parity.top1 > 0.955


def test_int8_passes_its_gate_on_a_sample(smollm2: Bundle, gguf: Path) -> None:
    from skerry.core.files import read_json
    from skerry.exporter.engine import open_runner
    from skerry.exporter.parity import measure
    from skerry.exporter.reference import load_reference
    from skerry.exporter.weights import open_source

    tokenizer, template = open_texts_files(smollm2.path, read_json(smollm2.path / "generation.json"))
    rows = encode_rows(open_texts(None, None).parity[:8], tokenizer, template, 2048)
    with open_runner(smollm2, None, 512) as runner:
        parity = measure(load_reference(open_source(gguf)), [runner], rows, lambda stage, done, total: None)[0]
    assert parity.tokens > 700 and 2 < parity.reference_nll < 4
    assert parity.ppl_ratio < 1.015 and parity.kl < 0.01 and parity.top1 > 0.945


@pytest.mark.thorough  # small files are held to their own definition by test_gguf_blocks.py
def test_transformers_reads_the_same_weights(gguf: Path) -> None:
    """The reference goes through our GGUF reader; this holds that reader to transformers', tensor by tensor."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from skerry.exporter.weights import open_source

    logging.disable_progress_bar()
    source = open_source(gguf)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    theirs = model.state_dict()
    assert set(theirs) - {"lm_head.weight"} == set(source.names())
    for name in source.names():
        assert np.array_equal(theirs[name].numpy(), source.tensor(name)), name
