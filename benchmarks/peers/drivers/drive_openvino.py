"""OpenVINO GenAI on a GGUF: continuous batching for several sequences; for one, that or LLMPipeline, the faster.

Token ids go in, so its tokenizer is in no time; no prefix cache; greedy; end-of-sequence ignored.
"""

from __future__ import annotations

import gc
import importlib.metadata
from time import perf_counter
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from protocol import Peer, serve

BATCHING, SINGLE = "ContinuousBatchingPipeline", "LLMPipeline"
BATCH_TOKENS = 2048  # the prompts of a whole batch in one step: faster than its default of 256


class OpenVino(Peer):
    def version(self) -> str:
        return importlib.metadata.version("openvino-genai")

    def open(self, model: str, threads: int) -> None:
        self.model, self.threads = model, threads
        self.pipelines: dict[str, Any] = {}
        self._pipeline(BATCHING)

    def settings(self, case: dict[str, Any]) -> list[str]:
        return [BATCHING] if case["case"] == "batch" else [BATCHING, SINGLE]

    def settle(self, used: set[str]) -> None:
        for name in set(self.pipelines) - used:
            del self.pipelines[name]
        gc.collect()

    def measure(self, case: dict[str, Any], setting: str) -> dict[str, float]:
        prompts = [prompt or [1] for prompt in case["prompts"]]  # of context 0: one token, whose step is not timed
        if case["case"] == "prefill":
            first, _ = self._generate(setting, prompts, 1)
            return {"seconds": first, "tokens": len(prompts[0])}
        if case["case"] == "decode":
            first, last = self._generate(setting, prompts, 1 + case["decode"])
            return {"seconds": last - first, "tokens": case["decode"]}
        first, last = self._generate(setting, prompts, case["output"])
        count, output = len(prompts), case["output"]
        return {"seconds": last, "tokens": count * output,
                "decode_seconds": last - first, "decode_tokens": count * (output - 1)}  # fmt: skip

    def _generate(self, setting: str, prompts: list[list[int]], output: int) -> tuple[float, float]:
        """Seconds until every sequence has its first token, and until all is done."""
        config = genai.GenerationConfig(max_new_tokens=output, ignore_eos=True, do_sample=False)
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return (self._batched if setting == BATCHING else self._single)(tensors, config, output)

    def _batched(self, tensors: list[Any], config: Any, output: int) -> tuple[float, float]:
        pipeline = self._pipeline(BATCHING)
        started = perf_counter()
        handles = [pipeline.add_request(index, tensor, config) for index, tensor in enumerate(tensors)]
        steps = []
        while pipeline.has_non_finished_requests():
            pipeline.step()
            steps.append(perf_counter() - started)
        for handle in handles:
            _check(len(handle.read_all()[0].generated_ids), output)
        return steps[-output], steps[-1]  # each of the last `output` steps gave one token to all

    def _single(self, tensors: list[Any], config: Any, output: int) -> tuple[float, float]:
        mask = openvino.Tensor(np.ones(tensors[0].shape, np.int64))
        started = perf_counter()
        result = self._pipeline(SINGLE).generate(genai.TokenizedInputs(tensors[0], mask), config)
        ended = perf_counter() - started
        _check(len(result.tokens[0]), output)
        if output == 1:
            return ended, ended
        # Its clock's zero is its own, and its unit milliseconds: what it says of first to last token is what counts.
        times = result.perf_metrics.raw_metrics.m_new_token_times
        return ended - (times[-1] - times[0]) / 1e3, ended

    def _pipeline(self, name: str) -> Any:
        if name not in self.pipelines:
            properties = {"INFERENCE_NUM_THREADS": self.threads}
            if name == SINGLE:
                self.pipelines[name] = genai.LLMPipeline(self.model, "CPU", scheduler_config=_scheduler(), **properties)
            else:
                self.pipelines[name] = genai.ContinuousBatchingPipeline(self.model, _scheduler(), "CPU", properties)
        return self.pipelines[name]


def _scheduler() -> Any:
    config = genai.SchedulerConfig()
    config.enable_prefix_caching = False
    config.max_num_batched_tokens = BATCH_TOKENS
    config.max_num_seqs = 256
    return config


def _check(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"{found} tokens came, {wanted} were asked for")


if __name__ == "__main__":
    serve(OpenVino())
