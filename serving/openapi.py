"""What /openapi.json says of the routes, beyond what FastAPI sees by itself: all that each may answer, and the key.

    @routes.post("/generate", **answers(Generated, 400, 503, stream=True))

A schema in it is a promise: tests/test_server_schema.py asks every route, and compares.

    python -m pytest tests/test_server_schema.py
"""

from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from serving.gate import OPEN
from serving.settings import Settings

ABOUT = """One engine, the OpenAI API, and the native API as SGLang names it.

A field that is not known is refused by name: nothing is accepted and ignored. Every failure is
`{"error": {"message", "type", "param", "code"}}`. docs/server.md says more, with examples."""
TAGS = [
    {"name": "OpenAI", "description": "As every OpenAI client speaks it, with the extras of vLLM and SGLang."},
    {"name": "Native", "description": "As SGLang names it."},
    {"name": "Health", "description": "Is it there, and how is it?"},
    {"name": "Page", "description": "For people."},
]
WHY = {
    400: "A field that is unknown, of the wrong type or out of its range; a prompt that is too long; a refused grammar",
    401: "The key is missing, or another one",
    404: "There is no such model",
    408: "The body has not come in time",
    413: "The body is too large",
    499: "The request was aborted by another one",
    500: "This request has failed in the engine, or a bug; the log says more",
    503: "The queue is full, or there is no engine; with Retry-After",
    504: "It took longer than a request may",
}
ALWAYS = (408, 413, 500, 504)  # of the gate, and of whatever runs behind it
STREAM = "text/event-stream"  # what an event holds, OpenAPI has no words for before 3.2


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None  # the field that is to blame
    code: str | None  # a word for programs


class ErrorAnswer(TypedDict):
    error: ErrorDetail


def answers(
    model: Any = None, *statuses: int, stream: bool = False, kind: str | None = None, tag: str = "Native"
) -> dict[str, Any]:
    """Arguments for a route: what it answers with 200, and the other statuses that it has besides those that all have.

    model: of JSON; or kind: another content type, of a text. stream: it may be events, too.
    """
    good: dict[str, Any] = {"description": "It is done"}
    kinds = [STREAM] if stream else [kind] if kind else []
    good["content"] = {kind: {} if kind == STREAM else {"schema": {"type": "string"}} for kind in kinds}
    if model is not None:
        good["model"] = model
    responses = {200: good} | {status: refusal(status) for status in sorted({*statuses, *ALWAYS})}
    return {"responses": responses, "response_class": Response, "tags": [tag]}


def refusal(status: int) -> dict[str, Any]:
    return {"model": ErrorAnswer, "description": WHY[status]}


def document(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """What /openapi.json answers."""
    whole = get_openapi(title=app.title, version=app.version, description=ABOUT, tags=TAGS, routes=app.routes)
    for path, operations in whole["paths"].items():
        for operation in operations.values():
            said = operation["responses"]
            said.pop("422", None)  # FastAPI's word for what is a 400 here
            if settings.api_key is not None and path not in OPEN:
                operation["security"] = [{"key": []}]
                said["401"] = said["413"] | {"description": WHY[401]}
    for unused in ("HTTPValidationError", "ValidationError"):
        whole["components"]["schemas"].pop(unused, None)
    if settings.api_key is not None:
        whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return whole
