"""Errors as the OpenAI API tells them: {"error": {"message", "type", "param", "code"}}, whatever has gone wrong, and where.

    install(app)
    raise ApiError(404, "there is no model 'x'", param="model", code="model_not_found")

python -m pytest tests/test_openai_protocol.py
"""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from errors import EngineFailed, UserError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """`param`: the field that is to blame. `headers`: of the answer, such as Retry-After."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers
        self.type = type or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        text = json.dumps(self.body)  # ASCII: the message may quote half a surrogate pair, which UTF-8 cannot have
        return Response(text, self.status, self.headers, media_type="application/json")


def api_error(error: Exception) -> ApiError:
    """Any exception, as the client gets to see it. What is a bug of ours is not shown."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case UserError():
            return ApiError(400, str(error))
        case EngineFailed():
            return ApiError(503, str(error))
        case _:
            return ApiError(500, "an error of the server's own; its log has the details")


def install(app: FastAPI) -> None:
    """Have an app answer every error in this shape. What is a bug of ours is raised again behind it, for the log."""

    async def answer(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    for kind in (ApiError, RequestValidationError, HTTPException, UserError, EngineFailed, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body; of the forms that a field may have, the one that was nearly met."""
    found = max(error.errors(), key=lambda e: len(_path(e["loc"], error.body)))
    param = _path_text(_path(found["loc"], error.body))
    message = found["msg"].removeprefix("Value error, ")
    match found["type"]:
        case "extra_forbidden":
            message = f"{param} is not supported"
        case "missing":
            message = f"{param or 'the body'} is missing"
        case "json_invalid":
            return ApiError(400, f"the body is not valid JSON: {found['ctx']['error']}")
        case _ if param:
            message = f"{param}: {message}"
    return ApiError(400, message, param=param or None)


def _path(loc: tuple[str | int, ...], body: Any) -> list[str | int]:
    """Where in the body it is: pydantic's `loc` without the names of the forms that were tried."""
    path: list[str | int] = []
    for i, key in enumerate(loc[1:], 2):
        if isinstance(key, int) and isinstance(body, list) and key < len(body):
            body = body[key]
        elif isinstance(body, dict) and (key in body or i == len(loc)):
            body = body.get(key)
        else:
            continue
        path.append(key)
    return path


def _path_text(path: list[str | int]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
