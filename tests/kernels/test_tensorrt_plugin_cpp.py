"""PagedAttention as TensorRT's plugin in C++, driven as TensorRT drives plugins (kernels/tensorrt/plugin_host.cpp), its
kernels on the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.kernels.pages import ALL_LAYOUTS
from skerry.kernels.reference import AttentionShape
from tests.kernels.test_cuda_attention import MIXED, Case, bound, case_of, check_stored, shape_of

FLOAT, HALF, INT32, BF16 = 0, 1, 3, 7  # nvinfer1::DataType
FIELD_FLOAT, FIELD_INT = 1, 5  # nvinfer1::PluginFieldType
FIELDS = "num_heads num_kv_heads head_size rotary_dim interleaved window kv_layout scale softcap"
INPUTS = (
    "q", "k", "v", "kv", "cos", "sin", "positions", "query_start", "context_len", "block_table", "slot", "plan",
)  # fmt: skip
SHAPE = shape_of(2, 64)
Pair = ctypes.c_int64 * 2


class Given(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("rank", ctypes.c_int32),
        ("min", Pair), ("max", Pair), ("dims", Pair),
    )  # fmt: skip


class Host:
    """TensorRT, as far as a plugin sees it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, []
        self.library = ctypes.CDLL(str(folder / "libskerry_tensorrt_host.so"))
        for name, kind in (("said", "char_p"), ("names", "char_p"), ("fields", "char_p"), ("build", "int64"),
                           ("create", "void_p"), ("reload", "void_p")):  # fmt: skip
            getattr(self.library, f"host_{name}").restype = getattr(ctypes, f"c_{kind}")

    def open(self, library: str) -> None:
        assert self.library.host_open(bytes(self._folder / library)) == 0, self.said()

    def close(self) -> None:
        for plugin in self._made:
            self.library.host_destroy(plugin)

    def said(self) -> str:
        return str(self.library.host_said().decode())

    def fields(self, plugin: Any) -> str:
        return str(self.library.host_fields(plugin).decode())

    def _keep(self, plugin: int | None) -> Any:
        self._made.append(ctypes.c_void_p(plugin))
        return self._made[-1] if plugin else None

    def create(self, **fields: float) -> Any:
        types = [FIELD_FLOAT if isinstance(value, float) else FIELD_INT for value in fields.values()]
        values = b"".join(
            (np.float32 if isinstance(value, float) else np.int32)(value).tobytes() for value in fields.values()
        )
        names = (ctypes.c_char_p * len(fields))(*(name.encode() for name in fields))
        return self._keep(self.library.host_create(len(fields), names, (ctypes.c_int32 * len(fields))(*types), values))

    def reload(self, plugin: Any) -> Any:
        return self._keep(self.library.host_reload(plugin))

    def build(self, plugin: Any, given: Any) -> int:
        return int(self.library.host_build(plugin, given))

    def step(self, plugin: Any, given: Any, out: np.ndarray, kv_out: np.ndarray, workspace: Any) -> int:
        return int(self.library.host_step(plugin, given, at(out), at(kv_out), workspace))


def at(array: np.ndarray) -> Any:
    return ctypes.c_void_p(array.ctypes.data)


def aligned(array: np.ndarray, fill: int = 0) -> np.ndarray:
    """A copy that begins at a multiple of 256 bytes, as device memory does."""
    whole = np.full(array.nbytes + 512, fill, np.uint8)
    start = -whole.ctypes.data % 256
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.fixture
def closed() -> Iterator[Host]:
    pytest.importorskip("skerry.kernels._emulated")
    from skerry.kernels import _native

    folder = Path(_native.__file__).parent
    if not (folder / "libskerry_tensorrt_host.so").exists():
        pytest.skip("the build found no NvInfer.h (cmake -DSKERRY_TENSORRT=DIR)")
    host = Host(folder)
    yield host
    host.close()


@pytest.fixture
def host(closed: Host) -> Host:
    closed.open("libskerry_tensorrt_emulated.so")
    return closed


def fields_of(shape: AttentionShape, layout: str) -> dict[str, float]:
    return {
        "num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads, "head_size": shape.head_size,
        "rotary_dim": shape.rotary_dim, "interleaved": int(shape.interleaved), "window": shape.window,
        "kv_layout": ALL_LAYOUTS.index(layout), "scale": float(shape.scale), "softcap": float(shape.softcap),
    }  # fmt: skip


@dataclass
class Step:
    """A case's arrays as the plugin takes them, and their profile: `more` tokens, sequences and table columns."""

    case: Case
    arrays: dict[str, np.ndarray]
    given: Any

    @classmethod
    def of(cls, case: Case, longest: int | None = None, more: int = 0, least: int = 1) -> Step:
        arrays = {name: aligned(getattr(case, name)) for name in INPUTS if name not in ("q", "k", "v", "plan")}
        arrays |= {name: aligned(case.narrow(getattr(case, name))) for name in ("q", "k", "v")}
        arrays["kv"] = arrays["kv"].view(np.int32)
        most = int(np.diff(case.query_start).max()) if longest is None else longest
        arrays["plan"] = np.zeros(most, np.int32)
        given = (Given * len(INPUTS))()
        for one, name in zip(given, INPUTS, strict=True):
            array = arrays[name]
            dims = [*array.shape, 0][:2]
            grows = {"block_table": (more, more)}.get(name, (0 if name in ("cos", "sin", "plan") else more, 0))
            one.data, one.rank, one.dims = array.ctypes.data, array.ndim, Pair(*dims)
            one.max = Pair(*(size + extra for size, extra in zip(dims, grows, strict=True)))
            one.min = Pair(least if name == "plan" else 1, dims[1])
            one.type = FLOAT if name in ("cos", "sin") else INT32
            if name in ("q", "k", "v"):
                one.type = BF16 if case.bfloat16 else HALF
        return cls(case, arrays, given)

    def __getitem__(self, name: str) -> Any:
        return self.given[INPUTS.index(name)]

    def run(self, host: Host, plugin: Any, bytes_there: int) -> tuple[np.ndarray, np.ndarray]:
        """(out, pages); the workspace holds anything before, and what lies behind it stays."""
        out = aligned(np.full(self.case.q.shape, 0x7FFF, np.uint16).view(self.arrays["q"].dtype))
        workspace = aligned(np.full(bytes_there + 64, 0xFF, np.uint8))
        code = host.step(plugin, self.given, out, self.arrays["kv"], at(workspace))
        assert code == 0, host.said()
        assert (workspace[bytes_there:] == 0xFF).all()
        return self.case.wide(out), self.arrays["kv"].view(np.uint8)


def verify(host: Host, plugin: Any, step: Step, bytes_there: int) -> None:
    out, pages = step.run(host, plugin, bytes_there)
    check_stored(step.case, pages)
    wanted = step.case.expected(pages)
    assert np.isfinite(out).all() and np.abs(out - wanted).max() <= bound(step.case, wanted)


@pytest.mark.parametrize(
    ("layout", "bfloat16"),
    [("f16.t16", False), ("bf16.t16", True), ("i8.t16", False), ("i8.t16", True), ("e4m3.t16", False)],
)
def test_an_engine_is_built_written_read_and_run(host: Host, layout: str, bfloat16: bool) -> None:
    built = host.create(**fields_of(SHAPE, layout))
    mixed = Step.of(case_of(1, SHAPE, MIXED, layout, bfloat16), more=7)
    bytes_there = host.build(built, mixed.given)
    assert bytes_there > 0, host.said()
    plugin = host.reload(built)
    verify(host, plugin, mixed, bytes_there)
    verify(host, plugin, Step.of(case_of(2, SHAPE, [(300, 1), (17, 1)], layout, bfloat16)), bytes_there)
    verify(host, plugin, Step.of(case_of(3, SHAPE, [(90, 90)], layout, bfloat16), longest=0), bytes_there)


def test_attributes_reach_the_kernels(host: Host) -> None:
    shape = shape_of(2, 64, 1, softcap=2.0, window=33, rotary_dim=16, interleaved=True)
    plugin = host.create(**fields_of(shape, "f16.t16"))
    step = Step.of(case_of(4, shape, [(300, 1), (90, 70)]))
    verify(host, plugin, step, host.build(plugin, step.given))


def test_a_step_of_no_tokens_does_nothing(host: Host) -> None:
    plugin = host.create(**fields_of(SHAPE, "f16.t16"))
    step = Step.of(case_of(5, SHAPE, [(3, 1)]))
    for name in ("q", "k", "v", "positions", "slot"):
        step[name].dims[0] = 0
    before = step.arrays["kv"].copy()
    assert host.step(plugin, step.given, step.arrays["q"], step.arrays["kv"], None) == 0, host.said()
    assert np.array_equal(step.arrays["kv"], before)


def test_fields_have_the_names_and_the_order_of_the_contract_and_survive_the_engine(host: Host) -> None:
    assert host.library.host_names().decode() == f"skerry::PagedAttention 1 {FIELDS}"
    fields = fields_of(shape_of(3, 128, window=40, rotary_dim=32, interleaved=True, softcap=30.0), "e4m3.t16")
    plugin = host.create(**dict(reversed(fields.items())))
    told = " ".join(
        f"{name}={value:.6f}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items()
    )
    assert host.fields(plugin) == host.fields(host.reload(plugin)) == told
    least = host.create(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125, kv_layout=3)
    assert host.fields(least) == (
        "num_heads=4 num_kv_heads=2 head_size=64 rotary_dim=64 interleaved=0 window=0 kv_layout=3 "
        "scale=0.125000 softcap=0.000000"
    )


def test_no_smaller_step_takes_more_workspace(host: Host) -> None:
    """Of shapes below a profile's largest; where the plan may be empty, of the longest query that tokens allow."""
    rng = np.random.default_rng(6)
    plugin = host.create(**fields_of(SHAPE, "f16.t16"))

    def bytes_of(tokens: int, sequences: int, width: int, longest: int, least: int = 1) -> int:
        step = Step.of(case_of(7, SHAPE, [(3, 1)]), least=least)
        for name, sizes in {
            "q": [tokens], "k": [tokens], "v": [tokens], "positions": [tokens], "slot": [tokens],
            "query_start": [sequences + 1], "context_len": [sequences], "block_table": [sequences, width],
            "plan": [longest],
        }.items():  # fmt: skip
            step[name].max[: len(sizes)] = sizes
        return host.build(plugin, step.given)

    for _ in range(200):
        tokens, sequences, width, longest = (int(n) for n in rng.integers(1, (100, 9, 80, 60)))
        largest, unknown = bytes_of(tokens, sequences, width, longest), bytes_of(tokens, sequences, width, longest, 0)
        smaller = [int(rng.integers(1, n + 1)) for n in (tokens, sequences, width, longest)]
        assert 0 < bytes_of(*smaller) <= largest <= unknown
        assert bytes_of(*smaller[:3], longest=tokens) <= unknown, host.said()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"head_size": 80}, "a head size of 80"), ({"num_heads": 3}, "3 heads over 2 KV heads"),
     ({"num_kv_heads": 0}, "over 0 KV heads"), ({"rotary_dim": 66}, "rotary dimension of 66"),
     ({"window": -1}, "window of -1"), ({"kv_layout": 0}, "kv_layout is 0, not one of a GPU"),
     ({"scale": float("nan")}, "scale is missing"), ({"scale": 1}, "scale is not one number of float32"),
     ({"softcap": -1.0}, "a soft cap of -1"), ({"heads": 4}, "no field is named heads")],
)  # fmt: skip
def test_fields_that_no_kernel_has_are_refused(host: Host, change: dict[str, float], said: str) -> None:
    assert host.create(**{**fields_of(SHAPE, "f16.t16"), **change}) is None
    text = host.said()
    assert text.startswith("skerry.PagedAttention: create: ") and said in text


@pytest.mark.parametrize(
    ("layout", "name", "change", "said"),
    [("f16.t16", "q", {"type": BF16}, "DataType of q is 7, not one of pages of kv_layout 3"),
     ("bf16.t16", "q", {"type": HALF}, "DataType of q is 1, not one of pages of kv_layout 4"),
     ("i8.t16", "q", {"type": FLOAT}, "DataType of q is 0, not one"),
     ("f16.t16", "k", {"type": BF16}, "DataType of k is 7, expected 1"),
     ("f16.t16", "kv", {"type": 2}, "DataType of kv is 2, expected 3"),
     ("f16.t16", "cos", {"type": HALF}, "DataType of cos is 1, expected 0"),
     ("f16.t16", "slot", {"type": 8}, "DataType of slot is 8, expected 3"),
     ("f16.t16", "q", {"max": Pair(1, 192)}, "columns of q is 192, expected 256"),
     ("f16.t16", "v", {"max": Pair(1, 64)}, "columns of v is 64, expected 128"),
     ("f16.t16", "kv", {"max": Pair(9, 2049)}, "bytes of a page of kv is 8196, expected 8192"),
     ("f16.t16", "cos", {"max": Pair(9, 16)}, "columns of cos is 16, expected 32"),
     ("f16.t16", "positions", {"rank": 2}, "positions has 2 dimensions, expected 1")],
)  # fmt: skip
def test_networks_that_do_not_fit_are_refused(
    host: Host, layout: str, name: str, change: dict[str, Any], said: str
) -> None:
    plugin = host.create(**fields_of(SHAPE, layout))
    step = Step.of(case_of(8, SHAPE, [(3, 1)], layout, layout == "bf16.t16"))
    for key, value in change.items():
        setattr(step[name], key, value)
    assert host.build(plugin, step.given) == -1
    assert said in host.said()


@pytest.mark.parametrize(
    ("name", "dims", "said"),
    [("k", (2, 128), "shape change: rows of k is 2, expected 1"),
     ("kv", (3, 100), "shape change: bytes of a page of kv is 400, expected 8192"),
     ("query_start", (3, 0), "shape change: length of query_start is 3, expected 2")],
)  # fmt: skip
def test_steps_that_do_not_fit_are_refused(host: Host, name: str, dims: tuple[int, int], said: str) -> None:
    plugin = host.create(**fields_of(SHAPE, "f16.t16"))
    step = Step.of(case_of(9, SHAPE, [(3, 1)]))
    step[name].dims = Pair(*dims)
    assert host.step(plugin, step.given, step.arrays["q"], step.arrays["kv"], None) != 0
    assert said in host.said()


def test_a_copy_of_the_pages_and_a_missing_workspace_are_refused(host: Host) -> None:
    plugin = host.create(**fields_of(SHAPE, "f16.t16"))
    step = Step.of(case_of(10, SHAPE, [(3, 1)]))
    out, kv = step.arrays["q"].copy(), step.arrays["kv"]
    assert host.step(plugin, step.given, out, kv.copy(), at(kv)) != 0
    assert "enqueue: kv and kv_out are two buffers" in host.said()
    assert host.step(plugin, step.given, out, kv, None) != 0
    assert "enqueue: there is no workspace" in host.said()


def test_what_kernels_refuse_is_told(host: Host) -> None:
    plugin = host.create(**fields_of(SHAPE, "f16.t16"))
    case = case_of(11, SHAPE, [(3, 1)])
    step = Step.of(replace(case, cos=case.cos[:0], sin=case.sin[:0]))
    assert host.build(plugin, step.given) == -1
    assert "configure: rotary tables without rows" in host.said()


def test_a_logger_of_another_major_version_is_not_called(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    """Its virtual functions lie elsewhere in their table."""
    host.library.host_be_another_version(1)
    try:
        assert host.create(head_size=80) is None and host.said() == ""
        assert "skerry.PagedAttention: create: scale is missing" in capfd.readouterr().err
    finally:
        host.library.host_be_another_version(0)


def test_the_library_for_gpus_is_built_with_anywhere_and_says_where_no_driver_is(closed: Host) -> None:
    closed.open("libskerry_tensorrt.so")
    plugin = closed.create(**fields_of(SHAPE, "f16.t16"))
    assert closed.fields(plugin) == closed.fields(closed.reload(plugin))
    step = Step.of(case_of(12, SHAPE, [(3, 1)]))
    assert closed.build(plugin, step.given) > 0, closed.said()
    if any(Path(place, "libcuda.so.1").exists() for place in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib")):
        pytest.skip("this machine has a CUDA driver")
    kv = step.arrays["kv"]
    assert closed.step(plugin, step.given, step.arrays["q"], kv, at(kv)) != 0
    assert "enqueue: no CUDA driver: libcuda.so.1" in closed.said()
