"""Do two engines choose the token that the file's own weights choose, wherever their errors leave no doubt?

    python -m skerry.benchmarks.studies.agreement --pair FILE.gguf BUNDLE [--pair ...] --text FILE [--text ...]
        --out FILE [--context 512] [--threads 2]

BUNDLE is `skerry export FILE.gguf --precision stored`; a text is plain, or JSON lines of chats. llama.cpp cuts it into
chunks of `--context` tokens. llama.cpp, our engine and the file dequantized to float32 (transformers reads it, so our
reader is not its own judge) predict the second half of every chunk, all under the very same tokens. Positions where
float32's margin between first and second token is more than twice the larger engine's error e must have one argmax for
all three: the difference of two log-probabilities moves by 2e at most.

With each position's own error that is arithmetic, and a disagreement would show that something else was compared. With
the largest error of the *other* chunks it can fail: that is the finding. llama.cpp tells its log-probabilities by
`llama-perplexity --kl-divergence-base`; `read_codes` says to what accuracy. Its server's `n_probs` would tell only the
first few, and only of tokens that it generated itself.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.documents import close_document, new_document
from skerry.benchmarks.peers.commands import run_logged
from skerry.benchmarks.peers.install import require
from skerry.benchmarks.peers.pins import PEERS
from skerry.core.bundle import Bundle, open_bundle
from skerry.core.errors import InputError, NotFound, UsageError
from skerry.core.files import sha256_bytes, sha256_file, write_json

Floats = npt.NDArray[np.float32]
MAGIC, HEADER = b"_logits_", struct.Struct("<Iii")
TOOL, SECONDS = "llama-perplexity", 3600.0
RANGE = 16.0  # nats below an engine's first token: what is less likely llama.cpp tells as being at this end
ENGINES = ("ours", "llama.cpp")


@dataclass(frozen=True)
class Chunk:
    """`told` [P, V]: llama.cpp's log-probabilities (nats) of the token after each of ids[first : first + P], in steps
    of `step`; at the end of its range the true value is that or less."""

    ids: list[int]
    first: int
    told: Floats
    step: float


@dataclass(frozen=True)
class Judged:
    """Of the positions of one chunk: float32's margin (nats), each engine's largest error over the vocabulary (nats),
    and whether its argmax is float32's; `same`: whether the engines agree with each other."""

    margin: Floats
    error: dict[str, Floats]
    right: dict[str, npt.NDArray[np.bool_]]
    same: npt.NDArray[np.bool_]


def read_codes(path: Path) -> Iterator[Chunk]:
    """The file of `--kl-divergence-base` (llama.cpp, tools/perplexity): a row is scale and least log-probability as
    floats, then 16 bits a token. So a value is off by scale / 2 at most, 16 / 65535 / 2 = 0.00012 nats.

    Raises InputError on another kind of file or a cut one.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError("read log-probabilities", path, f"does not begin with {MAGIC.decode()}")
        context, vocabulary, chunks = HEADER.unpack(file.read(HEADER.size))
        tokens = np.frombuffer(file.read(4 * context * chunks), "<i4").reshape(chunks, context)
        # It scores the second half of a chunk, and its last token predicts nothing that is known.
        first, width = context // 2, 2 * ((vocabulary + 1) // 2) + 4
        rows = context - 1 - first
        for ids in tokens:
            raw = file.read(2 * width * rows)
            if len(raw) != 2 * width * rows:
                raise InputError("read log-probabilities", path, "ends within a chunk", f"run {TOOL} again")
            words = np.frombuffer(raw, "<u2").reshape(rows, width)
            scale, least = np.ascontiguousarray(words[:, :4]).view("<f4").T[:, :, None]
            told = words[:, 4 : 4 + vocabulary] * scale + least
            yield Chunk(ids.tolist(), first, told.astype(np.float32), float(scale.max()))


def log_softmax(logits: Floats) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)


def judge(float32: Floats, ours: Floats, chunk: Chunk) -> Judged:
    """`float32` and `ours`: log-probabilities [P, V] at the chunk's positions."""
    second, first = np.partition(float32, -2, axis=1)[:, -2:].T
    told = {"ours": ours, "llama.cpp": chunk.told}
    chosen = {name: values.argmax(axis=1) for name, values in told.items()}
    return Judged(
        first - second,
        {name: error(values, float32) for name, values in told.items()},
        {name: ids == float32.argmax(axis=1) for name, ids in chosen.items()},
        chosen["ours"] == chosen["llama.cpp"],
    )


def error(told: Floats, float32: Floats) -> Floats:
    """The largest error of each row [P, V]. At the end of the range and below, only what float32 gives a token above
    the end counts, for every engine alike; an argmax is never there."""
    end = told.max(axis=1, keepdims=True) - RANGE
    off = np.where(told > end + 1e-3, np.abs(told - float32), np.maximum(float32 - end, 0))
    return np.asarray(off.max(axis=1), np.float32)


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """What was found over all chunks; `own` holds by arithmetic, `held_out` takes its bound from the other chunks."""
    margin = np.concatenate([item.margin for item in judged])
    found: dict[str, Any] = {
        "positions": len(margin), "chunks": len(judged), "margin": _spread(margin),
        "engines_agree": float(np.concatenate([item.same for item in judged]).mean()),
    }  # fmt: skip
    for name in ENGINES:
        right = np.concatenate([item.right[name] for item in judged])
        found[name] = {
            "error": _spread(np.concatenate([item.error[name] for item in judged])), "top1": float(right.mean()),
            "widest_margin_missed": float(margin[~right].max()) if not right.all() else None,
        }  # fmt: skip
    own = [np.maximum(*(item.error[name] for name in ENGINES)) for item in judged]
    return {**found, "own": _beyond(judged, own), "held_out": _beyond(judged, _of_others(judged))}


def _of_others(judged: Sequence[Judged]) -> list[Floats]:
    """For each chunk the larger engine's largest error in all other chunks, at each of its positions."""
    largest = [max(float(item.error[name].max()) for name in ENGINES) for item in judged]
    return [
        np.full(len(item.margin), max([*largest[:at], *largest[at + 1 :]], default=np.inf), np.float32)
        for at, item in enumerate(judged)
    ]


def _beyond(judged: Sequence[Judged], bounds: Sequence[Floats]) -> dict[str, Any]:
    """Positions whose margin is more than twice the bound, and who disagreed there: none may."""
    clear = [item.margin > 2 * bound for item, bound in zip(judged, bounds, strict=True)]
    missed = {
        name: sum(int((~item.right[name][where]).sum()) for item, where in zip(judged, clear)) for name in ENGINES
    }
    apart = sum(int((~item.same[where]).sum()) for item, where in zip(judged, clear))
    return {"positions": sum(int(where.sum()) for where in clear), "missed": missed, "engines_apart": apart}


def _spread(values: Floats) -> dict[str, float]:
    quantiles = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}
    return {"mean": float(values.mean()), **{name: float(np.quantile(values, at)) for name, at in quantiles.items()},
            "max": float(values.max())}  # fmt: skip


def joined(texts: Sequence[Path]) -> str:
    """Of a chat, what its messages say. Raises InputError where a file cannot be read."""
    return "\n\n".join(part for path in texts for part in _parts(path))


def _parts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return [text]
        return [str(message["content"]) for line in text.splitlines() for message in json.loads(line)["messages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("read text", path, repr(error), "plain text, or JSON lines with messages") from error


def study(file: Path, bundle: Bundle, text: str, context: int, threads: int) -> dict[str, Any]:
    """Raises UsageError where the bundle was made from another file, SkerryError where llama.cpp fails."""
    from skerry.kernels.runner import Runner

    lineage = json.dumps(bundle.manifest.lineage)
    digest = sha256_file(file)
    if digest not in lineage:
        hint = f"skerry export {file} --precision stored --out BUNDLE"
        raise UsageError("compare engines", bundle.short, f"it was not made from {file.name}", hint)
    reference = _reference(file, threads)
    judged, step = [], 0.0
    with (
        tempfile.TemporaryDirectory() as scratch,
        Runner.open(bundle, threads=threads, pages=-(-context // bundle.manifest.kv[0].page_size)) as runner,
    ):
        codes = Path(scratch) / "codes"
        _ask(file, text, codes, context, threads)
        for chunk in read_codes(codes):
            where = slice(chunk.first, len(chunk.ids) - 1)
            judged.append(judge(reference(chunk.ids)[where], log_softmax(runner.logits_for(chunk.ids)[where]), chunk))
            step = max(step, chunk.step)
            print(f"{file.name}: {len(judged)} chunks", file=sys.stderr)
    return {"file": file.name, "sha256": digest, "bundle": bundle.digest, "precision": bundle.manifest.precision,
            "code_step": step, **figures(judged)}  # fmt: skip


def _ask(file: Path, text: str, out: Path, context: int, threads: int) -> None:
    """`-b` of one chunk: the tool would join several chunks in a batch otherwise, and need the logits of them all."""
    tool = Path(require(PEERS["llama.cpp"]).programs["llama-quantize"]).with_name(TOOL)
    if not tool.is_file():
        raise NotFound("find tool", tool, "llama.cpp was built without it", "skerry bench peers install llama.cpp")
    spoken = out.with_suffix(".txt")
    spoken.write_text(text, encoding="utf-8")
    words: list[str | Path] = [tool, "-m", file, "-f", spoken, "-c", str(context), "-b", str(context),
                               "-t", str(threads), "--kl-divergence-base", out]  # fmt: skip
    run_logged("score text", f"{file.name} by llama.cpp", words, out.with_suffix(".log"), SECONDS)


def _reference(file: Path, threads: int) -> Any:
    """ids -> log-probabilities [len(ids), V] in float32, by transformers from the dequantized file."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )

    def run(ids: list[int]) -> Floats:
        with torch.inference_mode():
            return log_softmax(opened(torch.tensor([ids])).logits[0].numpy())

    opened.eval()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=2, action="append", required=True, type=Path, metavar=("GGUF", "BUNDLE"))
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    text = joined(given.text)
    document = new_document(
        "agreement", settings={"texts": [path.name for path in given.text], "text_sha256": sha256_bytes(text.encode()),
                               "context": given.context},
        subject={"peer": f"llama.cpp {require(PEERS['llama.cpp']).version}"}, files=[],
    )  # fmt: skip
    for file, bundle in given.pair:
        found = study(file, open_bundle(bundle), text, given.context, given.threads)
        document["files"].append(found)
        write_json(given.out, close_document(document))
        print(json.dumps(found))


if __name__ == "__main__":
    main()
