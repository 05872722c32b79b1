"""The study's arithmetic: llama.cpp's codes, errors, and the rule that a clear margin decides alike."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from skerry.benchmarks.studies.agreement import (
    RANGE,
    Chunk,
    error,
    figures,
    joined,
    judge,
    log_softmax,
    read_codes,
)
from skerry.core.errors import InputError

CONTEXT, VOCABULARY = 8, 7


def codes_of(logits: np.ndarray) -> bytes:
    """A row as llama.cpp writes it: 16 nats below the first token over 65,535 steps, padded to an even vocabulary."""
    logp = log_softmax(logits[None])[0].astype(np.float64)
    least = max(logp.min(), logp.max() - RANGE)
    scale = (logp.max() - least) / 65535
    codes = np.rint(np.maximum(logp - least, 0) / scale).astype("<u2")
    return struct.pack("<2f", scale, least) + codes.tobytes() + bytes(2 * (len(codes) % 2))


def write_codes(path: Path, chunks: int) -> np.ndarray:
    logits = np.random.default_rng(1).normal(0, 8, (chunks, CONTEXT // 2 - 1, VOCABULARY)).astype(np.float32)
    head = b"_logits_" + struct.pack("<Iii", CONTEXT, VOCABULARY, chunks)
    tokens = np.arange(chunks * CONTEXT, dtype="<i4").tobytes()
    path.write_bytes(head + tokens + b"".join(codes_of(row) for chunk in logits for row in chunk))
    return logits


def test_codes_give_the_log_probabilities_back(tmp_path: Path) -> None:
    logits = write_codes(tmp_path / "codes", 3)
    chunks = list(read_codes(tmp_path / "codes"))
    assert [chunk.ids for chunk in chunks] == np.arange(24).reshape(3, 8).tolist() and chunks[0].first == 4
    for chunk, rows in zip(chunks, logits):
        wanted = log_softmax(rows)
        seen = wanted > wanted.max(axis=1, keepdims=True) - RANGE
        assert chunk.step <= RANGE / 65535 * 1.001
        np.testing.assert_allclose(chunk.told[seen], wanted[seen], atol=chunk.step / 2 + 1e-5)
        assert error(chunk.told, wanted).max() <= chunk.step / 2 + 1e-5


def test_codes_that_are_cut_or_none(tmp_path: Path) -> None:
    write_codes(tmp_path / "codes", 2)
    (tmp_path / "cut").write_bytes((tmp_path / "codes").read_bytes()[:-3])
    (tmp_path / "none").write_bytes(b"something else entirely")
    for name, said in (("cut", "ends within a chunk"), ("none", "does not begin with _logits_")):
        with pytest.raises(InputError, match=said):
            list(read_codes(tmp_path / name))


def test_error_beyond_the_range_counts_only_what_float32_gives_more() -> None:
    told = np.array([[0.0, -1.0, -16.0]], np.float32)
    assert error(told, np.array([[0.0, -1.25, -40.0]], np.float32)).tolist() == [0.25]
    assert error(told, np.array([[0.0, -1.25, -15.0]], np.float32)).tolist() == [1.0]


def rows_of(*margins: float) -> np.ndarray:
    """One row a margin; token 1 is first."""
    return np.stack([log_softmax(np.array([[0.0, margin, -3.0]], np.float32))[0] for margin in margins])


def chunk_of(told: np.ndarray) -> Chunk:
    return Chunk([], 0, told, 0.0)


def swapped(rows: np.ndarray) -> np.ndarray:
    """Another token is first, as much ahead as the first one was."""
    return np.ascontiguousarray(rows[:, [1, 0, 2]])


def test_a_margin_within_twice_the_error_decides_nothing() -> None:
    float32 = rows_of(1.0, 3.0)
    judged = judge(float32, swapped(float32), chunk_of(float32))
    np.testing.assert_allclose(judged.margin, [1.0, 3.0], atol=1e-6)
    np.testing.assert_allclose(judged.error["ours"], judged.margin, atol=1e-6)
    found = figures([judged])
    assert found["own"] == {"positions": 0, "missed": {"ours": 0, "llama.cpp": 0}, "engines_apart": 0}
    assert (found["ours"]["top1"], found["llama.cpp"]["top1"], found["engines_agree"]) == (0.0, 1.0, 0.0)
    assert found["ours"]["widest_margin_missed"] == pytest.approx(3.0) and not found["held_out"]["positions"]


def test_a_bound_from_other_chunks_can_be_broken() -> None:
    """Nine chunks are nearly exact; in the tenth an engine chooses another token at a wide margin."""
    float32 = rows_of(2.0, 4.0)
    chunks = [judge(float32, float32 + np.float32(0.01), chunk_of(float32)) for _ in range(9)]
    broken = judge(float32, swapped(float32), chunk_of(float32))
    found = figures([*chunks, broken])
    assert found["held_out"]["missed"] == {"ours": 2, "llama.cpp": 0} and found["held_out"]["engines_apart"] == 2
    assert found["own"]["missed"] == {"ours": 0, "llama.cpp": 0} and found["own"]["positions"] == 18


def test_any_noise_keeps_the_rule_for_a_position_s_own_error() -> None:
    random = np.random.default_rng(5)
    float32 = log_softmax(random.normal(0, 2, (400, 50)).astype(np.float32))
    ours, told = (log_softmax(float32 + random.normal(0, 0.3, float32.shape).astype(np.float32)) for _ in range(2))
    found = figures([judge(float32, ours, chunk_of(told))])
    assert found["own"]["positions"] > 10 and found["ours"]["top1"] < 1
    assert found["own"]["missed"] == {"ours": 0, "llama.cpp": 0} and found["own"]["engines_apart"] == 0


def test_texts_are_joined(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("one")
    chat = {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    assert joined([tmp_path / "plain.txt", tmp_path / "chats.jsonl"]) == "one\n\ntwo\n\nthree"
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(InputError, match="KeyError"):
        joined([tmp_path / "bad.jsonl"])
