"""The tokenizer of a bundle or checkpoint: `tokenizers`, opened one way everywhere, named by its file's digest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skerry.core.errors import InputError
from skerry.core.files import sha256_bytes


class Tokenizer:
    """Text to ids and back. Adds special tokens only when asked: templates spell them out."""

    def __init__(self, inner: Any, digest: str) -> None:
        self.inner = inner
        self.digest = digest

    @classmethod
    def open(cls, path: Path | str) -> Tokenizer:
        """Reads `tokenizer.json` (a file, or the directory that holds it). Raises InputError."""
        from tokenizers import Tokenizer as Inner

        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            raw = path.read_bytes()
            inner = Inner.from_buffer(raw)
        except (OSError, ValueError) as error:
            raise InputError("read tokenizer", path, str(error)) from error
        inner.no_padding()
        inner.no_truncation()
        return cls(inner, sha256_bytes(raw))

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Special tokens spelled out in `text` become their ids. `special`: with those that the tokenizer puts around
        every text of its own."""
        return list(self.inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))

    def id(self, token: str) -> int | None:
        found = self.inner.token_to_id(token)
        return None if found is None else int(found)
