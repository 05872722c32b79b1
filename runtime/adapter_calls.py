"""Loading and dropping adapters over HTTP, in vLLM's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skerry.runtime.adapters import Adapter, Adapters
from skerry.runtime.api_error import ApiError, refuse
from skerry.runtime.fields import boolean, utf8

MAX_TEXT = 4096


async def load(adapters: Adapters, body: dict[str, Any]) -> dict[str, Any]:
    """`lora_path` is taken relative to the directory that the operator allowed, and must lie in it."""
    folder = _folder(adapters)
    name, path = _text(body, "lora_name"), _text(body, "lora_path")
    adapter = await adapters.load(name, folder / path, root=folder, replace=boolean(body, "load_inplace"))
    return {"status": "loaded", "lora_name": name, "digest": adapter.digest, "rank": adapter.rank}


async def unload(adapters: Adapters, body: dict[str, Any]) -> dict[str, Any]:
    """`requests` still use it; they finish, and then its slot is free."""
    _folder(adapters)
    name = _text(body, "lora_name")
    return {"status": "unloaded", "lora_name": name, "requests": adapters.unload(name)}


def described(adapter: Adapter, parent: str, length: int) -> dict[str, Any]:
    """Its entry among the models."""
    return {
        "id": adapter.name, "object": "model", "created": adapter.since, "owned_by": "skerry",
        "root": str(adapter.path), "parent": parent, "max_model_len": length, "adapter_digest": adapter.digest,
    }  # fmt: skip


def _folder(adapters: Adapters) -> Path:
    if adapters.folder is None:
        raise ApiError(403, "adapters are not loaded over HTTP here; the server has no --adapter-dir", code="forbidden")
    return adapters.folder


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or "\0" in value:
        raise refuse(field, f"must be a string of 1 to {MAX_TEXT} characters", "missing_required_parameter")
    return utf8(value, field)
