"""torch as a peer of single operations: a driver process in the `transformers` peer's environment, or in this one where
that is not installed and torch can be imported here."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.peers.driver import Driver, PeerFailed
from skerry.benchmarks.peers.install import look
from skerry.benchmarks.peers.pins import PEERS
from skerry.core.errors import SkerryError

SCRIPT = Path(__file__).parent / "drivers" / "torch_ops.py"
ENVIRONMENT = "transformers"
START_SECONDS, ORDER_SECONDS = 120.0, 120.0


def interpreter() -> Path | None:
    """None: torch is nowhere to be found."""
    installed = look(PEERS[ENVIRONMENT])
    if installed is not None:
        return installed.python
    return Path(sys.executable) if importlib.util.find_spec("torch") else None


class TorchPeer:
    """Its driver is stopped between orders, so its threads never spin while somebody else is measured."""

    def __init__(self, driver: Driver, threads: int, folder: Path) -> None:
        self._driver, self._folder, self._used = driver, folder, 0
        opened = driver.ask("open", START_SECONDS, threads=threads)
        self.version, self.cuda = str(opened["version"]), bool(opened["cuda"])

    def prepare(self, kind: str, data: dict[str, npt.NDArray[Any]], **options: Any) -> Prepared:
        """Raises SkerryError where torch refuses, PeerFailed where its driver is gone."""
        self._used += 1
        name = f"{kind}-{self._used}"
        path = self._folder / f"{name}.npz"
        np.savez(path, **data)  # type: ignore[arg-type]
        try:
            answer = self.ask("prepare", case=name, kind=kind, data=str(path), options=options)
            with np.load(answer["output"]) as arrays:
                output = [arrays[key] for key in arrays.files]
        finally:  # read by now, and large
            for file in (path, path.with_suffix(".out.npz")):
                file.unlink(missing_ok=True)
        return Prepared(self, name, str(answer["variant"]), output)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        answer = self._driver.ask(op, ORDER_SECONDS, **fields)
        if "refused" in answer:
            raise SkerryError(op, fields.get("case", "torch"), str(answer["refused"]))
        return answer


class Prepared:
    """A case in the driver: what it computed, and its shot."""

    def __init__(self, peer: TorchPeer, name: str, variant: str, output: list[npt.NDArray[Any]]) -> None:
        self._peer, self._name, self.variant, self.output = peer, name, variant, output

    def shot(self, calls: int) -> float:
        return float(self._peer.ask("time", case=self._name, calls=calls)["seconds"])

    def forget(self) -> None:
        with contextlib.suppress(PeerFailed):  # a driver that is gone has nothing to forget
            self._peer.ask("forget", case=self._name)


@contextlib.contextmanager
def torch_peer(threads: int) -> Iterator[TorchPeer | None]:
    """None where there is no torch, and for 0 threads. Raises PeerFailed where it does not start."""
    python = interpreter() if threads else None
    if python is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as directory:
        folder = Path(directory)
        with Driver("torch", [python, SCRIPT], folder / "torch.log") as driver:
            yield TorchPeer(driver, threads, folder)
