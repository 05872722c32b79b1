"""A peer for tests: a driver that behaves as the model's name says, and a GGUF with a header and nothing else."""

from __future__ import annotations

import struct
from pathlib import Path

from skerry.benchmarks.peers.pins import DRIVERS

FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(DRIVERS)!r})
from protocol import Peer, serve

class Fake(Peer):
    calls = 0
    def version(self): return "1.5"
    def open(self, model, threads):
        self.mode = model
        os.write(1, b"a library says hello\\n")
        print("and again")
        if model == "refuses": raise ValueError("cannot open\\nthat")
    def settings(self, case): return ["slow", "fast"]
    def settle(self, used): self.used = used
    def measure(self, case, setting):
        self.calls += 1
        if case["case"] == "prefill" and self.mode != "good":
            if self.mode == "hangs": time.sleep(600)
            if self.mode == "dies":
                print("last words", file=sys.stderr, flush=True)
                os._exit(3)
            if self.mode == "killed": os.kill(os.getpid(), 9)
            if self.mode == "zero": return {{"seconds": 0.0, "tokens": 5}}
            if self.mode == "empty": return {{}}
        count = len(case["prompts"][0]) if case["case"] == "prefill" else case.get("decode") or case["output"]
        seconds = 1.0 if setting == "fast" else 4.0
        found = {{"seconds": seconds, "tokens": count}}
        if case["case"] == "batch":
            found |= {{"decode_seconds": seconds / 2, "decode_tokens": count - 1}}
        return found

if __name__ == "__main__": serve(Fake())
"""


def gguf(path: Path, layers: int = 2, hidden: int = 32, vocab: int = 96, kind: bytes = b"GGUF", cut: int = 0) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def number(key: str, value: int) -> bytes:
        return text(key) + struct.pack("<II", 4, value)

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        number("llama.block_count", layers), number("llama.embedding_length", hidden),
        text("a.flag") + struct.pack("<IB", 7, 1), text("some.scores") + struct.pack("<IIQ", 9, 6, 3) + bytes(12),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, vocab) + text("t") * vocab,
    ]  # fmt: skip
    data = kind + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)
    path.write_bytes(data[: len(data) - cut])
    return path
