"""Single operations in torch, driven as peers/drivers/protocol.py says: one JSON order a line on stdin, one answer a
line on stdout. Runs under the interpreter of a peer's own environment, so it imports the standard library, numpy and
torch.

    {"id", "op": "open", "threads": n}                                      ->  {"id", "version", "cuda"}
    {"id", "op": "prepare", "case", "kind", "data": x.npz, "options": {}}   ->  {"id", "output": y.npz, "variant"}
    {"id", "op": "time", "case", "calls": n}                                ->  {"id", "seconds"}
    {"id", "op": "forget", "case"}                                          ->  {"id"}

What torch refuses is answered by "refused" and concerns that one order. Where torch has several ways to do the same,
`prepare` times each and keeps the fastest: a peer is shown at its best.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Call = Callable[[int], Any]  # number of the call, which picks one of several copies of the data
TRIES = 3
PR_SET_PDEATHSIG = 1


def attention(data: dict[str, torch.Tensor], copies: int = 1, causal: bool = False) -> dict[str, Call]:
    """q [B, H, S, D], k and v [B, G, S, D]: H is a multiple of G. Keys are stored already: nothing is appended."""
    q = data["q"]
    caches = [(data["k"].clone(), data["v"].clone()) for _ in range(copies)]
    batch, heads, length, size = q.shape
    groups = caches[0][0].shape[1]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found: dict[str, Call] = {
        "enable_gqa": lambda i: sdpa(q, *caches[i % copies], is_causal=causal, enable_gqa=heads != groups)
    }
    if length == 1 and not causal:  # a group's heads as rows of one query: the keys are read once for all of them
        grouped = q.view(batch, groups, heads // groups, size)
        found["grouped"] = lambda i: sdpa(grouped, *caches[i % copies]).view(batch, heads, 1, size)
    return found


def sample(
    data: dict[str, torch.Tensor], temperature: float, top_k: int, top_p: float, prefilter: bool
) -> dict[str, Call]:
    """Tokens and how many ids were kept, of logits [B, V]. `prefilter`: topk first, so that only k values are sorted;
    else the whole row is sorted, which also serves where there is no top-k."""
    logits = data["logits"]

    def call(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits / temperature
        if prefilter:
            ordered, ids = torch.topk(scaled, top_k, dim=-1)
        else:
            ordered, ids = torch.sort(scaled, dim=-1, descending=True)
            if top_k:
                ordered[:, top_k:] = -torch.inf
        share = torch.softmax(ordered, dim=-1)
        before = torch.cumsum(share, dim=-1) - share
        share = torch.where(before < top_p, share, 0.0)
        drawn = torch.multinomial(share, 1)
        return ids.gather(-1, drawn).squeeze(-1), (share > 0).sum(-1)

    return {"topk" if prefilter else "sort": call}


def linear(data: dict[str, torch.Tensor]) -> dict[str, Call]:
    """x [M, K] by w [N, K], transposed."""
    x, w = data["x"], data["w"]
    return {"linear": lambda _: torch.nn.functional.linear(x, w)}


KINDS: dict[str, Callable[..., dict[str, Call]]] = {"attention": attention, "sample": sample, "linear": linear}


class Driver:
    def __init__(self) -> None:
        self.cases: dict[str, Call] = {}

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["op"] == "open":
            torch.set_num_threads(int(order["threads"]))
            return {"version": torch.__version__, "cuda": torch.cuda.is_available()}
        if order["op"] == "prepare":
            return self.prepare(order)
        if order["op"] == "forget":
            self.cases.pop(order["case"], None)
            return {}
        call, calls = self.cases[order["case"]], int(order["calls"])
        started = time.perf_counter()
        for index in range(calls):
            call(index)
        return {"seconds": time.perf_counter() - started}

    def prepare(self, order: dict[str, Any]) -> dict[str, Any]:
        path = Path(order["data"])
        with np.load(path) as arrays:
            data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        variants = KINDS[order["kind"]](data, **order["options"])
        outputs, seconds = {}, {}
        for name, call in variants.items():
            outputs[name] = call(0)
            seconds[name] = min(_seconds(call, index) for index in range(TRIES))
        best = min(seconds, key=lambda name: seconds[name])
        self.cases[order["case"]] = variants[best]
        found = outputs[best] if isinstance(outputs[best], tuple) else (outputs[best],)
        out = path.with_suffix(".out.npz")
        np.savez(out, *(value.numpy() for value in found))
        return {"output": str(out), "variant": best}


def _seconds(call: Call, index: int) -> float:
    started = time.perf_counter()
    call(index)
    return time.perf_counter() - started


def main() -> None:
    if sys.platform == "linux":  # it is stopped between orders, and so would never see that who asked has died
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    answers, sys.stdout = sys.stdout, sys.stderr  # what torch prints must not look like an answer
    driver = Driver()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = driver.obey(order)
        except Exception as error:  # noqa: BLE001  # whatever torch does not like: this order failed, the next may not
            answer = {"refused": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps({"id": order["id"], **answer}), file=answers, flush=True)


if __name__ == "__main__":
    main()
