"""Answers that are refusals, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from skerry.core.errors import SkerryError


class ApiError(Exception):
    """An answer in OpenAI's error shape. `retry_after` is in seconds."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after
        self.counted = False  # whether the metrics know of it

    @classmethod
    def of(cls, error: SkerryError) -> ApiError:
        retry = 1 if error.http_status in (429, 503) else 0
        return cls(error.http_status, f"{error}" + (f" ({error.hint})" if error.hint else ""), code=error.code,
                   retry_after=retry)  # fmt: skip

    @property
    def kind(self) -> str:
        names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refuse(field: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{field}: {message}", param=field, code=code)
