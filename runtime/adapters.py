"""The low-rank adapters of a worker: which names are served, in which slots of the engine, and who still uses them.

    load: a free slot -> read and written in a thread, while the engine steps -> the name points to it
    unload: the name is gone at once -> its last request ends -> a step that may still read it ends -> the slot is free

A name that is loaded again with other content moves to another slot; requests that run finish on the old one. All
methods run on the event loop; only files and slots that no request can ask for are touched elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from skerry.core.errors import Conflict, IncompatibleError, InputError, NotFound, SkerryError
from skerry.kernels.adapters import LOAD, AdapterSlots
from skerry.runtime.peft import read_peft
from skerry.runtime.peft_config import Base

UNLOAD = "unload adapter"
_NAME = re.compile(r"[A-Za-z0-9][\w.:@/-]{0,127}", re.ASCII)


@dataclass(eq=False)
class Adapter:
    """`digest` names its content, `users` are requests that have not ended."""

    name: str
    path: Path
    slot: int
    digest: str = ""
    rank: int = 0
    since: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    named: bool = False


class Lease:
    """One request's use of an adapter, or of none. Its slot is not given to another before `release`."""

    def __init__(self, adapter: Adapter | None = None, ended: Callable[[Adapter], None] = lambda adapter: None) -> None:
        self.adapter, self._ended = adapter, ended
        self._held = adapter is not None
        if adapter is not None:
            adapter.users += 1

    @property
    def slot(self) -> int:
        return -1 if self.adapter is None else self.adapter.slot

    @property
    def scope(self) -> bytes:
        """What of it decides the contents of pages."""
        return b"" if self.adapter is None else self.adapter.digest.encode()

    def release(self) -> None:
        """Once or more often."""
        if self._held and self.adapter is not None:
            self._held = False
            self._ended(self.adapter)


class Adapters:
    """`slots` None: an engine without any. `folder`: where clients may load from; None: nowhere. `after_step` calls
    back, from any thread, when no step runs that began before. `on_change` hears of each name that stands for something
    else from now on; of None, when it stands for nothing."""

    def __init__(self, slots: AdapterSlots | None = None, base: Base | None = None, folder: Path | None = None) -> None:
        self.folder = folder
        self.reserved: Collection[str] = ()  # names of the model itself
        self.after_step: Callable[[Callable[[], None]], None] = lambda callback: callback()
        self.on_change: Callable[[str, Adapter | None], None] = lambda name, adapter: None
        self._slots, self._base = slots, base
        self._named: dict[str, Adapter] = {}
        self._held: dict[int, Adapter] = {}  # by slot, those that are on their way out among them
        self._free = list(range(self.slots - 1, -1, -1))
        self._leaving: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Lock()

    @property
    def slots(self) -> int:
        return 0 if self._slots is None else len(self._slots.values)

    @property
    def loaded(self) -> list[Adapter]:
        """In the order of their names."""
        return [self._named[name] for name in sorted(self._named)]

    def by_slot(self) -> dict[int, str]:
        return {slot: adapter.name for slot, adapter in self._held.items()}

    def get(self, name: str | None) -> Adapter | None:
        return self._named.get(name) if name is not None else None

    def lease(self, name: str | None) -> Lease:
        """Of no adapter where none has that name."""
        adapter = self.get(name)
        return Lease() if adapter is None else Lease(adapter, self._ended)

    async def load(self, name: str, path: Path, *, root: Path | None = None, replace: bool = False) -> Adapter:
        """Reads a PEFT folder and serves it as `name`. With `root`, only from below that directory. The same content
        again changes nothing. Raises NotFound, InputError, IncompatibleError, and Conflict where the name stands for
        other content (without `replace`) or no slot is free; then nothing has changed."""
        if not _NAME.fullmatch(name):
            raise InputError(LOAD, repr(name[:130]), "no name", "1 to 128 letters, digits and any of . : @ / _ -")
        if name in self.reserved:
            raise Conflict(LOAD, name, "the model itself has that name", "another name")
        if self._slots is None or not self.slots:
            hint = "skerry export --adapters, then skerry serve --adapter-slots N"
            raise IncompatibleError(LOAD, name, "this engine was opened without slots for adapters", hint)
        async with self._loading:
            return await self._load(self._slots, name, path, root, replace)

    async def _load(self, slots: AdapterSlots, name: str, path: Path, root: Path | None, replace: bool) -> Adapter:
        found = await asyncio.to_thread(read_peft, path, name, slots.layout, slots.rank, self._base, root)
        old = self._named.get(name)
        if old is not None and old.digest == found.digest:
            return old
        if old is not None and not replace:
            cause = f"loaded already, with other content ({old.digest[:12]}; this is {found.digest[:12]})"
            raise Conflict(LOAD, name, cause, "unload it first, or load_inplace: true")
        adapter = Adapter(name, path, await self._take(name), found.digest, found.rank)
        try:
            await asyncio.to_thread(slots.load, adapter.slot, found.deltas)
        except Exception as error:
            self._free.append(adapter.slot)
            if isinstance(error, SkerryError):  # it names the slot alone
                raise IncompatibleError(LOAD, name, error.cause, error.hint) from error
            raise
        old = self._named.get(name)  # it may have been unloaded meanwhile
        self._named[name] = adapter
        adapter.named = True
        self._held[adapter.slot] = adapter
        if old is not None:
            self._leave(old)
        self.on_change(name, adapter)
        return adapter

    def unload(self, name: str) -> int:
        """New requests find no such name from now on; how many still use it. Raises NotFound."""
        adapter = self._named.pop(name, None)
        if adapter is None:
            raise NotFound(UNLOAD, name, "no such adapter is loaded")
        self._leave(adapter)
        self.on_change(name, None)
        return adapter.users

    async def _take(self, name: str) -> int:
        if not self._free and self._leaving:
            await asyncio.wait(self._leaving, return_when=asyncio.FIRST_COMPLETED)
        if not self._free:
            beside = ", and what replaces another needs one beside it" if name in self._named else ""
            cause = f"all {self.slots} slots are taken{beside}"
            raise Conflict(LOAD, name, cause, "unload another, or skerry serve --adapter-slots with more")
        return self._free.pop()

    def _leave(self, adapter: Adapter) -> None:
        adapter.named = False
        if not adapter.users:
            self._vacate_soon(adapter)

    def _ended(self, adapter: Adapter) -> None:
        adapter.users -= 1
        if not adapter.users and not adapter.named:
            self._vacate_soon(adapter)

    def _vacate_soon(self, adapter: Adapter) -> None:
        task = asyncio.get_running_loop().create_task(self._vacate(adapter.slot))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _vacate(self, slot: int) -> None:
        """A request that was cancelled may be in the step that runs: its slot is left alone until that is over."""
        assert self._slots is not None
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and with it this task
                loop.call_soon_threadsafe(over.set)

        self.after_step(tell)
        await over.wait()
        del self._held[slot]
        await asyncio.to_thread(self._slots.drop, slot)
        self._free.append(slot)
