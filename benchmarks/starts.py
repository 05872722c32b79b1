"""How long a server takes from the start of its process to its first token: files in memory (warm), or not (cold)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from skerry.benchmarks.page_cache import drop_page_cache
from skerry.benchmarks.server import open_server
from skerry.benchmarks.stats import Figure


def measure_starts(
    target: str, threads: int | None, repeats: int, report: Callable[[str], None], cold: bool = True
) -> dict[str, Figure]:
    """Figures `start_warm` and, where asked for, `start_cold`, seconds. Cold: the bundle's files have left the page
    cache; the interpreter and its packages stay in memory, as they do on a node that changes engines. `start_cold` is
    absent where they could not be made to leave."""
    if repeats == 0:
        return {}
    with open_server(target, threads):  # whatever is built at the first start ever
        report("starts")
    files = [file for file in sorted(Path(target).iterdir()) if file.is_file()]
    found: dict[str, list[float]] = {"start_warm": [], **({"start_cold": []} if cold else {})}
    for _ in range(repeats):
        for name, values in found.items():
            if name == "start_cold" and not drop_page_cache(files):
                continue
            with open_server(target, threads) as server:
                assert server.first_token_seconds is not None
                values.append(server.first_token_seconds)
    labels = {"start_warm": "process start to first token, files in memory",
              "start_cold": "process start to first token, bundle on disk"}  # fmt: skip
    return {name: Figure(labels[name], "s", "lower", tuple(values)) for name, values in found.items() if values}
