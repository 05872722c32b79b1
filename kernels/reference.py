"""The definition of the custom ops, slow and plain; every backend is compared with it.

PagedAttention computes in float64 from float32 inputs, so a backend differs from it by its own rounding alone. What is
stored is exact up to the float32 rounding of the rotation. With pages of codes there are two more roundings, stated
here: of queries, and of a split's weights.

Sample decides by steps that every backend must agree on bit for bit, because a kept set is either right or wrong:

1. float32, one rounding each, in this order, for every (id, count) of the row's history, in the order given:
   x = x / repetition if x > 0 else x * repetition;  x = x - frequency * count;  x = x - presence where count > 0.
   Then x = x + bias for every (id, value), and -inf where the mask's bit is not set.
2. temperature < 1e-5: the largest x, lowest id first. Otherwise z = float32(x / temperature).
3. Order: z descending, id ascending; -inf takes no part. weight = e^(z - max z) by `weight_of`, a polynomial of
   double-precision multiplies and adds in a stated order. mass = floor(weight * 2^40), a whole number: sums of masses
   are exact, so they depend on no order and no thread.
4. top_k: the first k. top_p < 1: the shortest prefix of what is left whose masses sum to at least
   max(1, ceil(double(top_p) * double(total mass))). min_p: those with weight >= double(min_p).
5. Gumbel-max in its exponential form: u(id) = (word + 0.5) / 2^32 from Philox4x32-10 with key = seed and counter =
   (id // 4, token_index, 0, 0), word id % 4; the least -log(u) / weight wins, lowest id first. (Taking -log of that
   quotient gives log weight + Gumbel noise.)

Log-probability and entropy are of softmax(raw logits). A raw row with a NaN or +inf, or all -inf, has no distribution:
token -1 and NaN. So has a row of which steps 1 and 2 leave nothing, or a NaN or +inf; its entropy is still reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from skerry.kernels.blocks import BLOCK, Blocks
from skerry.kernels.pages import CODE_BLOCK, CODES, Logical, round_blocks, rounded, stored
from skerry.kernels.sampling import Sampled, SampleRows

Array = npt.NDArray[np.floating]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

GREEDY_TEMPERATURE = np.float32(1e-5)
MASS_UNIT = float(1 << 40)
SPLIT, WEIGHT_TOP = 256, 16383  # keys whose weights are rounded together, and to how many steps


@dataclass(frozen=True)
class AttentionShape:
    """Attributes of PagedAttention. `window` counts the token itself; 0: all of the past. `softcap` 0: none."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rotary_dim: int = 0
    interleaved: bool = False
    softcap: float = 0.0
    window: int = 0


def rotate(x: Array, cos: Array, sin: Array, rotary_dim: int, interleaved: bool) -> npt.NDArray[np.float64]:
    """x [..., head_size] by the rows cos, sin [rotary_dim / 2]: a pair (a, b) becomes (a cos - b sin, b cos + a sin).
    Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) interleaved (Su et al., RoFormer, 2021)."""
    out = x.astype(np.float64)
    half = rotary_dim // 2
    first = slice(0, rotary_dim, 2) if interleaved else slice(0, half)
    second = slice(1, rotary_dim, 2) if interleaved else slice(half, rotary_dim)
    a, b = x[..., first].astype(np.float64), x[..., second].astype(np.float64)
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def paged_attention(
    q: Float32, k: Float32, v: Float32, kv: Logical, cos: Float32, sin: Float32, positions: Int32, query_start: Int32,
    context_len: Int32, block_table: Int32, slot: Int32, shape: AttentionShape, layout: str = "",
) -> tuple[npt.NDArray[np.float64], Logical]:  # fmt: skip
    """Rotate, append at `slot`, attend to what is stored. Returns o [T, H * D] and the new kv [pages, 2, Hkv, page, D],
    float32 or float16: what is stored is rounded to that, or to codes if `layout` says so (pages.py has the bytes).

    Sequence b's last query token is its token context_len[b] - 1; token i sees keys j <= i, with a window
    only j > i - window. Tokens past query_start[-1] are padding and give zeros; so does a query without keys.
    """
    heads, groups, size = shape.num_heads, shape.num_kv_heads, shape.head_size
    page_size = kv.shape[3]
    kv = kv.copy()
    for t in range(query_start[-1]):
        if slot[t] < 0:
            continue
        page, row = divmod(int(slot[t]), page_size)
        at = int(positions[t])
        key = rotate(k[t].reshape(groups, size), cos[at], sin[at], shape.rotary_dim, shape.interleaved)
        kept = key.astype(np.float32), v[t].reshape(groups, size)
        kv[page, 0, :, row], kv[page, 1, :, row] = stored(layout, *kept) if layout == CODES else kept
    out = np.zeros((len(q), heads, size))
    for b, context in enumerate(context_len.tolist()):
        tokens = np.arange(query_start[b], query_start[b + 1])
        for t, index in zip(tokens, range(context - len(tokens), context)):
            first = max(0, index + 1 - shape.window) if shape.window else 0
            seen = np.arange(first, index + 1)
            past = kv[block_table[b, seen // page_size], :, :, seen % page_size].astype(np.float64)
            at = positions[t]
            query = rotate(q[t].reshape(heads, size), cos[at], sin[at], shape.rotary_dim, shape.interleaved)
            if layout == CODES:
                query = rounded(query * shape.scale, CODE_BLOCK).astype(np.float64) / shape.scale
            for head in range(heads):
                keys, values = past[:, 0, head * groups // heads], past[:, 1, head * groups // heads]
                splits = seen // SPLIT if layout == CODES else None
                out[t, head] = _attend(query[head], keys, values, shape, splits)
    return out.reshape(len(q), heads * size), kv


def _attend(
    query: Array, keys: Array, values: Array, shape: AttentionShape, splits: npt.NDArray[np.intp] | None = None
) -> Array:
    """`splits`: the split of each key, whose weights are rounded together."""
    scores = keys @ query * shape.scale
    if shape.softcap:
        scores = shape.softcap * np.tanh(scores / shape.softcap)
    weights = np.exp(scores - scores.max())
    total = weights.sum()
    for split in [] if splits is None else np.unique(splits):
        part = splits == split
        weights[part] = _round_weights(weights[part], values[part])
    return weights @ values / total


def _round_weights(weights: Array, values: Array) -> Array:
    """To multiples of 1/16383 of the largest product of a weight and the scale of its value."""
    scales = np.abs(values).max(-1) / 127
    scaled = weights * scales
    unit = scaled.max() / WEIGHT_TOP
    if not unit > 0:
        return np.zeros_like(weights)
    return np.rint(scaled / unit) * unit / np.where(scales > 0, scales, 1)


def philox4x32(counter: npt.NDArray[np.uint32], seed: int) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 of counters [n, 4] (Salmon et al., SC 2011; constants of Random123)."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    low = np.uint64(0xFFFFFFFF)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = b >> np.uint64(32) ^ c1 ^ np.uint64(key0), b & low
        c2, c3 = a >> np.uint64(32) ^ c3 ^ np.uint64(key1), a & low
        key0, key1 = key0 + 0x9E3779B9 & 0xFFFFFFFF, key1 + 0xBB67AE85 & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(seed: int, token_index: int, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """The noise of each id, strictly between 0 and 1; it depends on nothing but these arguments."""
    counter = np.zeros((len(ids), 4), np.uint32)
    counter[:, 0] = ids // 4
    counter[:, 1] = token_index
    words = philox4x32(counter, seed)[np.arange(len(ids)), ids % 4]
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def weight_of(z: Float32, top: np.float32) -> npt.NDArray[np.float64]:
    """e^(z - top) in double, every operation rounded once in this order; 0 more than 700 below."""
    d = z.astype(np.float64) - np.float64(top)
    c = np.maximum(d, -700.0)
    shift = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to a whole number
    k = (c * 1.4426950408889634 + shift) - shift
    r = (c - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    factorials = [6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0]
    p = np.full_like(r, 1.0 / factorials[0])
    for coefficient in [1.0 / f for f in factorials[1:]] + [0.5, 1.0, 1.0]:
        p = p * r + coefficient
    return np.where(d < -700.0, 0.0, np.ldexp(p, k.astype(np.int64)))


def adjusted(logits: Float32, rows: SampleRows, row: int) -> Float32:
    """Step 1."""
    x = logits.astype(np.float32).copy()
    for i in range(rows.hist_start[row], rows.hist_start[row + 1]):
        at, count = rows.hist_ids[i], rows.hist_counts[i]
        value = x[at] / rows.repetition[row] if x[at] > 0 else x[at] * rows.repetition[row]
        value = value - rows.frequency[row] * np.float32(count)
        x[at] = value - rows.presence[row] if count > 0 else value
    for i in range(rows.bias_start[row], rows.bias_start[row + 1]):
        x[rows.bias_ids[i]] += rows.bias_values[i]
    if rows.mask_row[row] >= 0:
        words = rows.mask[rows.mask_row[row]].view(np.uint32)
        ids = np.arange(len(x))
        x[(words[ids // 32] >> (ids % 32).astype(np.uint32) & 1) == 0] = -np.inf
    return x


def kept(logits: Float32, rows: SampleRows, row: int) -> tuple[Int32, npt.NDArray[np.float64]]:
    """Steps 1 to 4: the ids that may be drawn, ascending, and their weights. Empty: nothing can be."""
    nothing = np.zeros(0, np.int32), np.zeros(0)
    if not (logits < np.inf).all():
        return nothing
    x = adjusted(logits, rows, row)
    greedy = rows.temperature[row] < GREEDY_TEMPERATURE
    z = x if greedy else x / rows.temperature[row] + np.float32(0)
    if not (z < np.inf).all() or z.max() == -np.inf:
        return nothing
    if greedy:
        return np.array([np.argmax(z)], np.int32), np.ones(1)
    order = np.argsort(-z, kind="stable")  # ties by the lowest id
    order = order[z[order] > -np.inf]
    weight = weight_of(z, z.max())
    if rows.top_k[row] > 0:
        order = order[: rows.top_k[row]]
    if rows.top_p[row] < 1:
        mass = np.floor(weight[order] * MASS_UNIT).astype(np.uint64)
        total = int(mass.sum())
        need = min(max(int(np.ceil(float(max(rows.top_p[row], 0)) * float(total))), 1), total)
        order = order[: 1 + int(np.searchsorted(np.cumsum(mass), need))]
    if rows.min_p[row] > 0:
        order = order[weight[order] >= float(rows.min_p[row])]
    ids = np.sort(order).astype(np.int32)
    return ids, weight[ids]


def draw(logits: Float32, rows: SampleRows, row: int) -> int:
    """Step 5; -1 where nothing can be drawn."""
    ids, weight = kept(logits, rows, row)
    ids, weight = ids[weight > 0], weight[weight > 0]
    if not len(ids):
        return -1
    u = uniform(int(rows.seed[row]), int(rows.token_index[row]), ids)
    return int(ids[np.argmin(-np.log(u) / weight)])


def sample(logits: Float32, rows: SampleRows) -> Sampled:
    """All rows. `top_ids` past the vocabulary are -1, their log-probability -inf."""
    count = len(logits)
    token = np.full(count, -1, np.int32)
    logprob, entropy = (np.full(count, np.nan, np.float32) for _ in range(2))
    top_ids = np.full((count, rows.top_n), -1, np.int32)
    top_logprobs = np.full((count, rows.top_n), np.nan, np.float32)
    for row in range(count):
        raw = logits[row].astype(np.float64)
        if not (raw < np.inf).all() or raw.max() == -np.inf:
            continue
        weight = np.exp(raw - raw.max())
        log_total = np.log(weight.sum())
        logp = raw - raw.max() - log_total
        entropy[row] = -np.sum(weight * np.maximum(logp, -1e300)) / weight.sum()
        best = np.argsort(-raw, kind="stable")[: rows.top_n]
        top_ids[row, : len(best)], top_logprobs[row] = best, -np.inf
        top_logprobs[row, : len(best)] = logp[best]
        token[row] = rows.target[row] if rows.target[row] >= 0 else draw(logits[row], rows, row)
        if token[row] >= 0:
            logprob[row] = logp[token[row]]
    return Sampled(token, logprob, entropy, top_ids, top_logprobs)


class Activation(IntEnum):
    """Of the first of two products, before it multiplies the second."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2


@dataclass(frozen=True)
class BlockProduct:
    """A weight matrix of MatMulBlock and its bias [N], if it has one."""

    weight: Blocks
    bias: Float32 | None = None


@dataclass(frozen=True)
class Adapters:
    """Low-rank terms (LoRA: Hu et al., 2021) of all products of a graph, one slot each: `values` [A, R, W]. From
    column `offset` on lie, for each product of a node, the K columns of down and the N of up, whose scale is in it.
    Sequence b has tokens query_start[b] to query_start[b + 1] - 1 and the slot rows[b], -1 for none; tokens past
    query_start[-1] have none."""

    values: npt.NDArray[np.float16]
    rows: Int32
    query_start: Int32
    offset: int

    def slots(self, tokens: int) -> Int32:
        """Of each token."""
        found = np.full(tokens, -1, np.int32)
        found[: self.query_start[-1]] = np.repeat(self.rows, np.diff(self.query_start))
        return found

    def deltas(self, x: Float32, widths: Sequence[int]) -> list[npt.NDArray[np.float64]]:
        """Of x [T, K], for products of so many rows each, [T, N]."""
        slots, at, found = self.slots(len(x)), self.offset, []
        for width in widths:
            delta = np.zeros((len(x), width))
            for slot in set(slots[slots >= 0].tolist()):
                columns = self.values[slot].astype(np.float64)
                down, up = columns[:, at : at + x.shape[1]], columns[:, at + x.shape[1] : at + x.shape[1] + width]
                delta[slots == slot] = x[slots == slot].astype(np.float64) @ down.T @ up
            found.append(delta)
            at += x.shape[1] + width
        return found


def quantize_activations(x: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    """Codes int8 [T, blocks, 32] and scales float32 [T, blocks], rounded as `round_blocks` says."""
    codes, scales = round_blocks(x, BLOCK)
    return codes.astype(np.int8), scales


def rms_norm(x: Float32, weight: Float32, epsilon: float) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + epsilon) * weight


def activate(x: Array, activation: Activation) -> Array:
    """silu, or gelu in its tanh form (Hendrycks and Gimpel, 2016)."""
    if activation is Activation.SILU:
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def matmul_block(
    x: Float32, products: Sequence[BlockProduct], *, norm: Float32 | None = None, residual: Float32 | None = None,
    epsilon: float = 0.0, activation: Activation = Activation.NONE, adapters: Adapters | None = None,
) -> list[npt.NDArray[np.float64]]:  # fmt: skip
    """MatMulBlock: x [T, K], normalized if `norm` [K] is given, rounded to 8 bits by block, times each weight [N, K]
    transposed, plus bias, plus residual [T, N]. With an activation: that of the first product, times the second. Sums
    in float64, of exact products: a backend differs by its float32 sums over blocks alone, in the order of k.

    Adapters are of what is normalized and not yet rounded, and are added after the bias. A backend's order, in float32
    with a fused multiply-add where there is one, halves widened: down, 16 sums by k mod 16 in ascending k, then sum i
    takes sum i + 8, i + 4, i + 2 and i + 1; up, from 0 in ascending order of rank. So rows of zeros change nothing."""
    normed = x if norm is None else rms_norm(x, norm, epsilon).astype(np.float32)
    codes, scales = quantize_activations(normed)
    rounded = (codes * scales[..., None].astype(np.float64)).reshape(len(x), -1)
    outs = []
    for product in products:
        out = rounded @ product.weight.dequantized().astype(np.float64).T
        outs.append(out if product.bias is None else out + product.bias)
    if adapters is not None:
        deltas = adapters.deltas(normed, [product.weight.rows for product in products])
        outs = [out + delta for out, delta in zip(outs, deltas, strict=True)]
    if activation:
        return [activate(outs[0], activation) * outs[1]]
    return outs if residual is None else [outs[0] + residual]
