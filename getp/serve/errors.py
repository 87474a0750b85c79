"""Errors of the API, in OpenAI's shape."""

from collections.abc import Mapping
from typing import Any

from getp.openai.parsed import BadRequestError

_TYPES = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}


class ApiError(Exception):
    """An answer with a status of 400 or more, for one client."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": str(self),
            "type": _TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def bad_request(error: BadRequestError) -> ApiError:
    """Return the error of a request with an invalid field."""
    code = "context_length_exceeded" if error.code == "prompt_too_long" else error.code
    return ApiError(500 if code == "internal_error" else 400, str(error), code)


def not_found(kind: str, name: str, hint: str = "") -> ApiError:
    """Return the error of an object that does not exist."""
    return ApiError(404, f"there is no {kind} {name[:100]!r}{hint}", "not_found")
