"""The page pool: who holds which KV pages, and which of them hold tokens that are worth finding again.

Contents and layout belong to the engine. One pool serves every KV group: a sequence holds the same page numbers in each
group, so the books are kept once.

A full page may be named by its key, a hash chained over all tokens up to its end, begun with what else decides its
contents (`root_key`). A named page can be held by several sequences at once, since nobody writes to a full page; when
nobody holds it any more it stays findable until its memory is needed, least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class OutOfPages(Exception):
    """The pool cannot give that many pages now; the scheduler's cue to wait or to preempt."""


def root_key(*scope: bytes) -> bytes:
    """Where a chain begins: pages are shared within a scope alone (adapter, tenant), never beyond it."""
    state = hashlib.blake2b(digest_size=16)
    for part in scope:
        state.update(len(part).to_bytes(4, "little") + part)
    return state.digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page that holds `tokens` behind the page (or root) of key `parent`."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Page numbers 0..pages-1. A page is given twice or returned twice: RuntimeError."""

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {pages} pages of {page_size} tokens holds nothing")
        self.pages = pages
        self.page_size = page_size
        self.evicted = 0
        self._free = list(range(pages - 1, -1, -1))  # hold nothing worth keeping; last returned first
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, held by nobody; least recently used first
        self._holders = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that `take` can give: empty ones and those nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.pages - self.free

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that would be found again."""
        return len(self._idle)

    @property
    def tokens(self) -> int:
        """Tokens that fit when every page is used."""
        return self.pages * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """All `count` pages, of no content, or, with OutOfPages, none."""
        if count > self.free:
            raise OutOfPages(f"{count} pages wanted, {self.free} free")
        taken = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._holders[page] = 1
            taken.append(page)
        return taken

    def hold(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of `keys` that is known, each held once more."""
        held = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1
            held.append(page)
        return held

    def name(self, page: int, key: bytes) -> None:
        """`page` is full and holds what `key` says. Where another page has that name already, it keeps it."""
        if not self._holders[page]:
            raise RuntimeError(f"page {page} is named, and nobody holds it")
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, pages: Sequence[int]) -> None:
        """What is in them is not to be trusted: nobody finds them again."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]

    def give(self, pages: Sequence[int]) -> None:
        """Lets go of a sequence's pages. Its last are the first to be used for something else: a chain is found only as
        far as its beginning is still there."""
        for page in reversed(pages):
            if not self._holders[page]:
                raise RuntimeError(f"page {page} returned twice")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def known(self) -> list[tuple[bytes, int]]:
        """(key, page) of what nobody holds and could be found again, most recently used first: a page's predecessors
        stand before it."""
        return [(self._key_of[page], page) for page in reversed(self._idle)]

    def adopt(self, key: bytes) -> int | None:
        """An empty page for content that is known already, to be written by the caller, as the first that is used for
        something else; None where none is empty or the key is known."""
        if not self._free or key in self._page_of:
            return None
        page = self._free.pop()
        self._page_of[key], self._key_of[page] = page, key
        self._idle[page] = None
        self._idle.move_to_end(page, last=False)
        return page

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self.forget((page,))
        self.evicted += 1
        return page
