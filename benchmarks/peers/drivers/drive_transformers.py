"""Transformers on torch, float32: the GGUF is dequantised as it is opened. Several sequences are a static batch."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from time import perf_counter

import torch
import transformers
from protocol import StaticBatch, serve


class Transformers(StaticBatch):
    def version(self) -> str:
        return f"{importlib.metadata.version('transformers')} (torch {torch.__version__})"

    def open(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        path = Path(model)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], output: int) -> tuple[float, float]:
        """Seconds until the first token and until the last; greedy, without `generate` and its cost a step."""
        ids = torch.tensor(prompts)
        cache = transformers.DynamicCache(config=self.model.config)
        started = perf_counter()
        times = []
        for _ in range(output):
            logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            times.append(perf_counter() - started)
        return times[0], times[-1]


if __name__ == "__main__":
    serve(Transformers())
