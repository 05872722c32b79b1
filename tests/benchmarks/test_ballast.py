from __future__ import annotations

from skerry.benchmarks import ballast as module
from skerry.benchmarks.ballast import available_memory, ballast
from skerry.benchmarks.memory import process_memory


def test_it_is_written_and_given_back(monkeypatch):
    import os

    monkeypatch.setattr(module, "MOST", 64 << 20)
    before = process_memory(os.getpid())["rss"]
    with ballast() as size:
        held = process_memory(os.getpid())["rss"] - before
        assert size == min(64 << 20, size) and held > 0.9 * size > 0
    assert process_memory(os.getpid())["rss"] - before < 0.5 * size


def test_no_more_than_a_share_and_nothing_where_nothing_is_known(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  40960 kB\n")
    assert available_memory(tmp_path / "meminfo") == 40 << 20
    assert available_memory(tmp_path / "none") == 0
    monkeypatch.setattr(module, "available_memory", lambda: 40 << 20)
    with ballast() as size:
        assert size == 10 << 20
    monkeypatch.setattr(module, "available_memory", lambda: 0)
    with ballast() as size:
        assert size == 0
