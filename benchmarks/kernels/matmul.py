"""The dense product x [M, K] by w [N, K]: ONNX Runtime's MatMulNBits, which is what our engines run today, beside torch
in float32. Blocks of 32, float32 scales, zero point in the middle, int8 activations (accuracy level 4), as the exporter
writes them. Bytes are those of the packed weights and their scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.kernels.contest import Case, Peer, calls_of
from skerry.benchmarks.kernels.ort_peer import Bound, session
from skerry.benchmarks.kernels.read_sum import data, reader
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import GateFailed, SkerryError

Float32 = npt.NDArray[np.float32]
BLOCK, ACCURACY_LEVEL = 32, 4
TOLERANCE = 0.02  # relative, in the Frobenius norm: rounding activations to 8 bits costs 0.5% to 1%
PEER_TOLERANCE = 1e-4
SQUARE = 1024  # of the product that stands for what the machine can multiply


@dataclass(frozen=True)
class Shape:
    """`rows` are the M at which such a product occurs: a head only sees the rows that are sampled."""

    label: str
    n: int
    k: int
    rows: tuple[int, ...]


SHAPES = (Shape("head of SmolLM2-135M", 49_152, 576, (1, 8)), Shape("MLP of a 1B Llama", 8192, 2048, (1, 8, 512)))
BITS = (8, 4)


def cases(setting: Setting) -> Iterator[Case]:
    """Checked against the product of the dequantized weights. Raises GateFailed where ONNX Runtime's is wrong."""
    rng = np.random.default_rng(setting.seed)
    yield square(setting)
    for shape in setting.dense_shapes or SHAPES:
        weights = rng.standard_normal((shape.n, shape.k), np.float32) * np.float32(shape.k**-0.5)
        for bits in BITS:
            packed, scales, exact = pack(weights, bits)
            for rows in shape.rows:
                x = rng.standard_normal((rows, shape.k), np.float32)
                yield _case(setting, shape, bits, x, packed, scales, exact)


def square(setting: Setting) -> Case:
    """The float32 product of two squares: a ceiling for prefill, not a figure of ours."""
    rng = np.random.default_rng(setting.seed)
    a, b = (rng.standard_normal((SQUARE, SQUARE), np.float32) for _ in range(2))
    opened = session("MatMul", "", {"a": a, "b": b}, ("y",), setting.threads)
    bound = Bound(opened, {"a": a, "b": b}, {"y": np.zeros((SQUARE, SQUARE), np.float32)})
    bound.run()
    _check("matmul_f32_1024", bound.output("y"), a.astype(np.float64) @ b, PEER_TOLERANCE)
    return Case("matmul_f32_1024", f"float32 product, {SQUARE} cubed", calls_of(lambda _: bound.run()), work=SQUARE**3)


def pack(weights: Float32, bits: int) -> tuple[npt.NDArray[np.uint8], Float32, Float32]:
    """(packed [N, blocks, BLOCK * bits / 8], scales [N, blocks], what they stand for [N, K])."""
    n, k = weights.shape
    middle = 1 << (bits - 1)
    blocks = weights.reshape(n, k // BLOCK, BLOCK)
    scales = (np.abs(blocks).max(-1) / np.float32(middle - 1)).astype(np.float32)
    codes = (np.rint(blocks / scales[..., None]) + middle).astype(np.uint8)
    exact = ((codes.astype(np.float32) - middle) * scales[..., None]).reshape(n, k)
    packed = codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(packed), scales, exact


def _case(
    setting: Setting,
    shape: Shape,
    bits: int,
    x: Float32,
    packed: npt.NDArray[np.uint8],
    scales: Float32,
    exact: Float32,
) -> Case:
    rows = len(x)
    name = f"matmul_int{bits}_n{shape.n}_k{shape.k}_m{rows}"
    setting.report(f"{name}: checking")
    weights: dict[str, npt.NDArray[Any]] = {"data": packed, "scales": scales.reshape(-1)}
    inputs: dict[str, npt.NDArray[Any]] = {"x": x, **weights}
    opened = session(
        "MatMulNBits", "com.microsoft", inputs, ("y",), setting.threads, constants=weights, spin=False, N=shape.n,
        K=shape.k, bits=bits, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL,
    )  # fmt: skip
    bound = Bound(opened, {"x": x}, {"y": np.zeros((rows, shape.n), np.float32)})
    bound.run()
    expected = x.astype(np.float64) @ exact.astype(np.float64).T
    _check(name, bound.output("y"), expected, TOLERANCE)
    label = f"dense product, int{bits}, {shape.label} ({shape.n} x {shape.k}), M={rows}"
    case = Case(name, label, calls_of(lambda _: bound.run()), work=packed.nbytes + scales.nbytes)
    if rows == 1:
        array = data(int(case.work))
        case.ceiling, close = reader(array, setting.threads)
        case.ceiling_work = array.nbytes
        setting.on_close(close)
    case.peers = tuple(setting.peer("torch", name, lambda: _torch(setting, x, exact, expected)))
    return case


def _torch(setting: Setting, x: Float32, exact: Float32, expected: npt.NDArray[np.float64]) -> Peer:
    assert setting.torch is not None
    prepared = setting.torch.prepare("linear", {"x": x, "w": exact})
    setting.on_close(prepared.forget)
    error = _error(prepared.output[0], expected)
    if not error <= PEER_TOLERANCE:
        raise SkerryError("check peer", "linear", f"relative error {error:.3g}, at most {PEER_TOLERANCE:g}")
    return Peer("torch float32", setting.torch.version, prepared.shot)


def _check(name: str, found: Float32, expected: npt.NDArray[np.float64], tolerance: float) -> None:
    error = _error(found, expected)
    if not error <= tolerance:
        cause = f"relative error {error:.3g}, at most {tolerance:g}"
        raise GateFailed("check kernel", name, cause, "a wrong product has no figures")


def _error(found: Float32, expected: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
