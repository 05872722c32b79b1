"""ONNX Runtime GenAI on a model of its own builder. Several sequences are a static batch: on a processor it has no
continuous one, and prompts of one length need none."""

from __future__ import annotations

import importlib.metadata
import json
from time import perf_counter

import numpy as np
import onnxruntime_genai as genai
from protocol import StaticBatch, serve


class OnnxRuntimeGenAi(StaticBatch):
    def version(self) -> str:
        return importlib.metadata.version("onnxruntime-genai")

    def open(self, model: str, threads: int) -> None:
        config = genai.Config(model)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = genai.Model(config)

    def generate(self, prompts: list[list[int]], output: int) -> tuple[float, float]:
        """Seconds until the first token and until the last. `min_length` keeps it from ending early."""
        length = len(prompts[0]) + output
        params = genai.GeneratorParams(self.model)
        params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(self.model, params)
        ids = np.array(prompts, np.int32)
        started = perf_counter()
        generator.append_tokens(ids)
        times = []
        for _ in range(output):
            generator.generate_next_token()
            times.append(perf_counter() - started)
        found = len(generator.get_sequence(0))
        if found != length:
            raise RuntimeError(f"a sequence of {found} tokens came, {length} were asked for")
        return times[0], times[-1]


if __name__ == "__main__":
    serve(OnnxRuntimeGenAi())
