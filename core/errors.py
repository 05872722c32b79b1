"""The error tree: every error names the operation, its object, the cause and the next step.

One tree serves the CLI (exit codes), the HTTP servers (status codes) and the journals, so that the same fault reads
the same everywhere. Exit codes: 1 failed, 2 usage, 3 gate failed, 4 auth, 5 timeout, 6 inconclusive or invalid.
"""

from __future__ import annotations

from typing import Any


class SkerryError(Exception):
    """`operation` is a verb ("verify bundle"), `obj` what it was done to, `cause` why it failed, `hint` what to do."""

    exit_code = 1
    http_status = 500
    code = "failed"

    def __init__(self, operation: str, obj: object, cause: str, hint: str = "") -> None:
        self.operation = operation
        self.obj = str(obj)
        self.cause = cause
        self.hint = hint
        super().__init__(f"{operation} {self.obj}: {cause}" if self.obj else f"{operation}: {cause}")

    def render(self) -> str:
        """The two lines a person reads on stderr."""
        return f"Error: {self}" + (f"\nTry: {self.hint}" if self.hint else "")

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "message": str(self), "hint": self.hint}


class UsageError(SkerryError):
    """The command line or a parameter asks for something that makes no sense."""

    exit_code, http_status, code = 2, 400, "usage"


class ConfigError(UsageError):
    """A configuration file, environment variable or flag has an unknown key or a value of the wrong type."""

    code = "config"


class InputError(SkerryError):
    """Data from outside (a file, a request, a message) is malformed or out of bounds."""

    http_status, code = 400, "invalid_input"


class BundleError(SkerryError):
    """A bundle is truncated, tampered with, or not a bundle."""

    http_status, code = 422, "bad_bundle"


class IncompatibleError(SkerryError):
    """Both sides are sound but do not fit: another target, unknown ops, too little memory."""

    http_status, code = 409, "incompatible"


class NotFound(SkerryError):
    http_status, code = 404, "not_found"


class Conflict(SkerryError):
    """The object's state does not allow the operation."""

    http_status, code = 409, "conflict"


class GateFailed(SkerryError):
    """A measured quality or health figure is beyond its limit."""

    exit_code, http_status, code = 3, 422, "gate_failed"


class AuthError(SkerryError):
    exit_code, http_status, code = 4, 401, "unauthorized"


class DeadlineExceeded(SkerryError):
    exit_code, http_status, code = 5, 504, "timeout"


class Inconclusive(SkerryError):
    """Too little evidence, or an invalid measurement."""

    exit_code, http_status, code = 6, 409, "inconclusive"


class StorageError(SkerryError):
    """The disk is full, read-only or otherwise refuses; nothing half written is left behind."""

    http_status, code = 507, "storage"


class Unavailable(SkerryError):
    """The other side cannot be reached or is not ready; trying again later may help."""

    http_status, code = 503, "unavailable"
