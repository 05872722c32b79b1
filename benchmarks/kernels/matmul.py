"""The dense product x [M, K] by w [N, K]: our MatMulBlock (int8 activations; Q8_0 and Q4_0) beside ONNX Runtime's
MatMulNBits on the same codes (blocks of 32, float32 scales, accuracy level 4) and torch in float32. Bytes are those of
our packed weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.kernels.contest import Case, Peer, calls_of
from skerry.benchmarks.kernels.ort_peer import Bound, session
from skerry.benchmarks.kernels.read_sum import data, reader
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import GateFailed, SkerryError
from skerry.kernels import _native
from skerry.kernels.blocks import BLOCK, BlockFormat, Blocks, pack

Float32 = npt.NDArray[np.float32]
ACCURACY_LEVEL = 4
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
FORMATS = {8: BlockFormat.Q8_0, 4: BlockFormat.Q4_0}


def cases(setting: Setting) -> Iterator[Case]:
    """Checked against the product of the dequantized weights. Raises GateFailed where ours is wrong."""
    rng = np.random.default_rng(setting.seed)
    yield square(setting)
    for shape in setting.dense_shapes or SHAPES:
        weights = rng.standard_normal((shape.n, shape.k), np.float32) * np.float32(shape.k**-0.5)
        for bits in FORMATS:
            matrix = quantized(weights, bits)
            packed, exact = pack(matrix), matrix.dequantized()
            for rows in shape.rows:
                x = rng.standard_normal((rows, shape.k), np.float32)
                yield _case(setting, shape, bits, x, matrix, packed, exact)


def square(setting: Setting) -> Case:
    """The float32 product of two squares: a ceiling for prefill, not a figure of ours."""
    rng = np.random.default_rng(setting.seed)
    a, b = (rng.standard_normal((SQUARE, SQUARE), np.float32) for _ in range(2))
    opened = session("MatMul", "", {"a": a, "b": b}, ("y",), setting.threads)
    bound = Bound(opened, {"a": a, "b": b}, {"y": np.zeros((SQUARE, SQUARE), np.float32)})
    bound.run()
    _check("matmul_f32_1024", bound.output("y"), a.astype(np.float64) @ b, PEER_TOLERANCE)
    return Case("matmul_f32_1024", f"float32 product, {SQUARE} cubed", calls_of(lambda _: bound.run()), work=SQUARE**3)


def quantized(weights: Float32, bits: int) -> Blocks:
    """Symmetric, so that every contestant can hold the same codes."""
    n, k = weights.shape
    middle = 1 << (bits - 1)
    blocks = weights.reshape(n, k // BLOCK, BLOCK)
    scales = (np.abs(blocks).max(-1) / np.float32(middle - 1)).astype(np.float16)
    codes = np.clip(np.rint(blocks / scales[..., None].astype(np.float32)) + middle, 0, 2 * middle - 1)
    return Blocks(FORMATS[bits], codes.astype(np.uint8), scales)


def _case(
    setting: Setting, shape: Shape, bits: int, x: Float32, matrix: Blocks, packed: npt.NDArray[np.uint8],
    exact: Float32,
) -> Case:  # fmt: skip
    rows = len(x)
    name = f"matmul_int{bits}_n{shape.n}_k{shape.k}_m{rows}"
    setting.report(f"{name}: checking")
    segments = [(packed, shape.n, int(matrix.format), None)]

    def call(_: int) -> Float32:
        return _native.matmul_block(x, segments, threads=setting.threads)[0]

    expected = x.astype(np.float64) @ exact.astype(np.float64).T
    _check(name, call(0), expected, TOLERANCE)
    label = f"dense product, int{bits}, {shape.label} ({shape.n} x {shape.k}), M={rows}"
    case = Case(name, label, calls_of(call), work=packed.nbytes)
    if rows == 1:
        array = data(int(case.work))
        case.ceiling, close = reader(array, setting.threads)
        case.ceiling_work = array.nbytes
        setting.on_close(close)
    case.peers = (
        *setting.peer("onnxruntime", name, lambda: _nbits(setting, bits, x, matrix, expected)),
        *setting.peer("torch", name, lambda: _torch(setting, x, exact, expected)),
    )
    return case


def _nbits(setting: Setting, bits: int, x: Float32, matrix: Blocks, expected: npt.NDArray[np.float64]) -> Peer:
    """Two codes to a byte at 4 bits, the even k low; the zero point is the operator's default, the middle."""
    codes = matrix.codes if bits == 8 else matrix.codes[..., 0::2] | (matrix.codes[..., 1::2] << 4)
    scales = matrix.scales.astype(np.float32).reshape(-1)
    weights: dict[str, npt.NDArray[Any]] = {"data": np.ascontiguousarray(codes), "scales": scales}
    opened = session(
        "MatMulNBits", "com.microsoft", {"x": x, **weights}, ("y",), setting.threads, constants=weights,
        N=matrix.rows, K=matrix.width, bits=bits, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL,
    )  # fmt: skip
    bound = Bound(opened, {"x": x}, {"y": np.zeros((len(x), matrix.rows), np.float32)})
    bound.run()
    error = _error(bound.output("y"), expected)
    if not error <= TOLERANCE:
        raise SkerryError("check peer", "MatMulNBits", f"relative error {error:.3g}, at most {TOLERANCE:g}")
    return Peer("onnxruntime", metadata.version("onnxruntime"), calls_of(lambda _: bound.run()))


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
