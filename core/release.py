"""Release: one version, one bundle digest for each target, signed by the publisher."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skerry.core.errors import InputError, NotFound
from skerry.core.target import Device, Target

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def manifest_path(version: str, target: Target | str) -> str:
    """The TUF target path of a release's manifest for `target`."""
    return f"{check_version(version)}/{target}.manifest.json"


def check_version(version: str) -> str:
    if not _VERSION.fullmatch(version):
        raise InputError("read release", repr(version), "a version is letters, digits, dot, dash and underscore")
    return version


@dataclass(frozen=True)
class Release:
    """`bundles` maps a target's name to (manifest sha256, engine digest); `floor` grows with security fixes."""

    version: str
    bundles: Mapping[str, tuple[str, str]]
    floor: int = 0

    def pick(self, device: Device) -> tuple[str, str, str]:
        """(target, manifest sha256, engine digest) for a node: its own backends in order of preference."""
        for backend in device.backends:
            for name, (manifest, engine) in sorted(self.bundles.items()):
                target = Target.parse(name)
                fits = target.sm is None or any(gpu.sm == target.sm for gpu in device.gpus)
                if target.backend == backend and fits:
                    return name, manifest, engine
        raise NotFound("pick bundle", self.version, f"no bundle for backends {', '.join(device.backends)}")

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "floor": self.floor,
            "bundles": {name: {"manifest": m, "engine": e} for name, (m, e) in sorted(self.bundles.items())},
        }

    @classmethod
    def from_json(cls, raw: Any) -> Release:
        try:
            bundles = {str(Target.parse(k)): (str(v["manifest"]), str(v["engine"])) for k, v in raw["bundles"].items()}
            return cls(check_version(str(raw["version"])), bundles, int(raw.get("floor", 0)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("read release", "", f"malformed: {error!r}") from error
