"""What is put into an engine's adapter slots, and what is refused. tests/exporter/test_adapters.py runs engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import AdapterLayout, AdapterProjection
from skerry.core.errors import IncompatibleError, InputError, NotFound, UsageError
from skerry.kernels.adapters import AdapterSlots
from skerry.kernels.runner import Row, Runner, StepError, pack_rows

LAYOUT = AdapterLayout(40, (AdapterProjection("q", 8, 6, 0, 8), AdapterProjection("k", 8, 3, 20, 28)))


def halves(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16).astype(np.float32)


def test_down_and_up_lie_where_the_layout_says():
    slots = AdapterSlots(LAYOUT, 2, 4)
    assert slots.values.ctypes.data % 64 == 0
    a, b = halves(3, 8), halves(3, 3, seed=1)
    slots.load(1, {"k": (a, b, 0.5)})
    wanted = np.zeros((2, 4, 40), np.float16)
    wanted[1, :3, 20:28], wanted[1, :3, 28:31] = a, 0.5 * b.T
    np.testing.assert_array_equal(slots.values, wanted)
    slots.check_rows(np.array([-1, 1, 1], np.int32))
    with pytest.raises(InputError, match="adapter slot 0: nothing is loaded there"):
        slots.check_rows(np.array([1, 0], np.int32))
    slots.load(1, {"q": (halves(1, 8), halves(6, 1), 1.0)})
    assert not slots.values[1, :, 20:31].any() and slots.values[1, 0, :14].all()
    slots.drop(1)
    assert not slots.values.any()
    with pytest.raises(InputError, match="nothing is loaded"):
        slots.check_rows(np.array([1], np.int32))


@pytest.mark.parametrize(
    ("slot", "deltas", "words"),
    [
        (2, {"q": (halves(1, 8), halves(6, 1), 1.0)}, "load adapter 2: the engine has 2 slots"),
        (-1, {"q": (halves(1, 8), halves(6, 1), 1.0)}, "load adapter -1: the engine has 2 slots"),
        (0, {}, "no projections"),
        (0, {"v": (halves(1, 8), halves(6, 1), 1.0)}, "no projection v, but for example q"),
        (0, {"q": (halves(5, 8), halves(6, 5), 1.0)}, "q: rank 5, the engine was opened for 4"),
        (0, {"q": (halves(2, 7), halves(6, 2), 1.0)}, r"q: A \[2, 7\] and B \[6, 2\], A \[r, 8\] and B \[6, r\]"),
        (0, {"q": (halves(2, 8), halves(6, 3), 1.0)}, r"q: A \[2, 8\] and B \[6, 3\]"),
        (0, {"q": (halves(2, 8), halves(2, 6), 1.0)}, r"q: A \[2, 8\] and B \[2, 6\]"),
        (0, {"q": (halves(8), halves(6, 1), 1.0)}, r"q: A \[8\]"),
        (0, {"q": (halves(0, 8), halves(6, 0), 1.0)}, r"q: A \[0, 8\]"),
        (0, {"q": (halves(2, 8), halves(6, 2), 1e6)}, "q: values that are not finite halves"),
        (0, {"q": (halves(2, 8), halves(6, 2), float("nan"))}, "not finite"),
        (0, {"k": (halves(1, 8), halves(3, 1), 1.0), "q": (halves(2, 8) * np.inf, halves(6, 2), 1.0)}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_slot_as_it_was(slot: int, deltas: Any, words: str):
    slots = AdapterSlots(LAYOUT, 2, 4)
    slots.load(0, {"q": (halves(2, 8), halves(6, 2), 1.0)})
    before = slots.values.copy()
    with pytest.raises(InputError, match=words):
        slots.load(slot, deltas)
    np.testing.assert_array_equal(slots.values, before)
    assert slots.loaded == {0}


def test_only_what_is_loaded_can_be_dropped():
    slots = AdapterSlots(LAYOUT, 2, 4)
    with pytest.raises(NotFound, match="drop adapter 1"):
        slots.drop(1)
    with pytest.raises(InputError, match="drop adapter 2: the engine has 2 slots"):
        slots.drop(2)


def test_an_engine_without_room_says_so(bundle):
    with pytest.raises(IncompatibleError, match="1 adapter slots, but its graph takes no adapters"):
        Runner.open(bundle, pages=4, adapter_slots=1)
    for options in ({"adapter_slots": -1}, {"adapter_rank": 0}):
        with pytest.raises(UsageError, match="adapter slots of rank"):
            Runner.open(bundle, pages=4, **options)
    with Runner.open(bundle, pages=4) as runner:
        with pytest.raises(StepError, match="its graph takes none"):
            runner.step(pack_rows([Row([1], 0, [[0]], adapter=0)], 16))
        with pytest.raises(IncompatibleError, match="its graph takes none"):
            runner.load_adapter(0, {})
        with pytest.raises(IncompatibleError, match="its graph takes none"):
            runner.drop_adapter(0)


def test_a_graph_unlike_its_manifest(make_bundle):
    with pytest.raises(IncompatibleError, match="adapter_rows is missing; adapters is missing"):
        Runner.open(make_bundle(adapters=LAYOUT), pages=4)


def test_rows_carry_their_slots():
    rows = [Row([5, 6], 0, [[3]], adapter=2), Row([8], 0, [[4]]), Row([8], 0, [[5]], adapter=0)]
    batch = pack_rows(rows, 16)
    assert batch.adapter_rows.tolist() == [2, -1, 0] and batch.adapter_rows.dtype == np.int32
