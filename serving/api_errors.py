"""Every failure as the OpenAI API's error object: {"error": {"message", "type", "param", "code"}}.

Whoever fails raises ApiError or UserError; `api_error` turns any exception into the one that is told to the client.
"""

import json
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from errors import UserError
from serving.params import describe

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told. code: a word for programs; param: the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ModelNotFound(ApiError):
    def __init__(self, asked: str, served: str):
        message = f"there is no model {asked!r}; this server has {served!r}"
        super().__init__(404, message, param="model", code="model_not_found")

    @classmethod
    def unless_served(cls, asked: str | None, served: str) -> None:
        """Who names no model gets the one that there is."""
        if asked not in (None, served):
            raise cls(asked, served)


class ServerBusy(ApiError):
    """There is no room now; there will be."""

    def __init__(self, message: str):
        super().__init__(503, message, code="server_busy", headers={"Retry-After": "1"})


class EngineDown(ApiError):
    """The engine's process has gone, or has not come yet."""

    def __init__(self, message: str):
        super().__init__(503, message, code="engine_down", headers={"Retry-After": "5"})


class TimedOut(ApiError):
    def __init__(self, seconds: float):
        super().__init__(504, f"the request took longer than {seconds:g} s", code="timeout")


class RequestFailed(ApiError):
    """Something broke while this request ran."""

    def __init__(self, message: str):
        super().__init__(500, message, code="request_failed")


def api_error(error: BaseException) -> ApiError:
    """What a client is told about it. Of a bug of ours, only that it is one: the traceback is in the log."""
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError(400, str(error))
        case RequestValidationError():
            found = [(field_path(problem["loc"], error.body), problem) for problem in error.errors()]
            path, problem = max(found, key=lambda pair: len(pair[0]))  # of several forms, the one that was nearly met
            if (message := body_problem(problem, error.body)) is not None:
                return ApiError(400, message)
            return ApiError(400, describe(problem | {"loc": path}), param=".".join(map(str, path)) or None)
        case HTTPException(status_code=400):  # FastAPI's, of a body that it cannot even decode
            return ApiError(400, "the body is not JSON in UTF-8")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case _:
            return ApiError(500, "the server has a bug; its log says more", code="internal_error")


def body_problem(problem: dict[str, Any], body: Any) -> str | None:
    """What is wrong with a body as a whole, if something is."""
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}"
    if isinstance(body, bytes):
        return "the body is taken as JSON only if it is sent with Content-Type: application/json"
    return None


def field_path(loc: Sequence[str | int], body: Any) -> list[str | int]:
    """Where in the body it is, or in the query: pydantic's `loc` without the names of the forms that were tried there."""
    path: list[str | int] = []
    where, *loc = loc
    if where != "body":
        return loc
    for i, key in enumerate(loc, 1):
        inside = isinstance(body, dict) and key in body
        if inside or (isinstance(body, list) and isinstance(key, int) and key < len(body)):
            body = body[key]
        elif not (isinstance(body, dict) and i == len(loc)):  # the last one may be missing
            continue
        path.append(key)
    return path


def error_response(error: BaseException) -> Response:
    known = api_error(error)
    # ASCII: a name in the message may be a client's, and half a surrogate pair has no place in UTF-8
    content = json.dumps(known.body(), ensure_ascii=True)
    return Response(content, known.status, known.headers, media_type="application/json")
