"""A route whose refusals name the field as its client wrote it: messages[0].content[1].type, and what is wrong with it.

python -m pytest tests/test_openai_protocol.py
"""

from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from serving.api_errors import ApiError, body_problem


class NamingRoute(APIRoute):
    """Raises ApiError for a body that its model refuses."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def named(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise refusal(error.errors(), error.body) from error

        return named


def refusal(errors: list[dict[str, Any]], body: Any) -> ApiError:
    """The first thing that is wrong; where a field may have several forms, with the one that was nearly met."""
    found = max(errors, key=lambda error: len(_path(error, body)))
    if (message := body_problem(found, body)) is not None:
        return ApiError(400, message)
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in _path(found, body))
    param = param.removeprefix(".")
    match found["type"]:
        case "extra_forbidden":
            message = f"{param} is not supported"
        case "missing":
            message = f"{param or 'the body'} is missing"
        case _:
            message = f"{param}: " * bool(param) + found["msg"].removeprefix("Value error, ")
    return ApiError(400, message, param=param or None)


def _path(error: dict[str, Any], body: Any) -> list[str | int]:
    """Where in the body it is: pydantic's `loc` without the names of the forms that were tried."""
    path: list[str | int] = []
    for key in error["loc"][1:]:
        if isinstance(key, int) and isinstance(body, list) and key < len(body):
            body = body[key]
        elif isinstance(body, dict) and (key in body or error["type"] == "missing"):
            body = body.get(key)
        else:
            continue
        path.append(key)
    return path
