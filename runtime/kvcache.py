"""The page pool: which KV pages are free, and nothing else. Contents and layout belong to the engine.

One pool serves every KV group: a sequence holds the same page numbers in each group, so the books are kept once.
"""

from __future__ import annotations


class OutOfPages(Exception):
    """The pool cannot give that many pages now; the scheduler's cue to wait or to preempt."""


class PagePool:
    """Hands out page numbers 0..pages-1, last returned first. A page is given twice or returned twice: RuntimeError."""

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {pages} pages of {page_size} tokens holds nothing")
        self.pages = pages
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))
        self._taken = bytearray(pages)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.pages - len(self._free)

    @property
    def tokens(self) -> int:
        """Tokens that fit when every page is used."""
        return self.pages * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """All `count` pages or, with OutOfPages, none."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} free")
        if count <= 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for page in taken:
            self._taken[page] = 1
        return taken

    def give(self, pages: list[int]) -> None:
        for page in pages:
            if not self._taken[page]:
                raise RuntimeError(f"page {page} returned twice")
            self._taken[page] = 0
        self._free.extend(reversed(pages))
