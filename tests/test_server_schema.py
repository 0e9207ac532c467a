"""Every route keeps to what /openapi.json promises: schemathesis makes requests out of the document, good ones and bad ones.

python -m pytest tests/test_server_schema.py
FOLIO_EXAMPLES=2000 python -m pytest tests/test_server_schema.py      # a longer hunt, other requests each time
"""

import os
from functools import cache
from random import Random
from types import SimpleNamespace

import httpx
import pytest
import schemathesis
from hypothesis import settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from server_process import MODEL, Server
from waiting import HANG

from serving.app import make_app
from serving.fields import EXAMPLES, WORDS
from serving.settings import Settings
from tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(MODEL)
EXAMPLES_EACH = int(os.environ.get("FOLIO_EXAMPLES", "12"))
CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


@cache
def document(**options) -> dict:
    return make_app(SimpleNamespace(), TOKENIZER, Settings("folio-tiny", **options)).openapi()


api = schemathesis.openapi.from_dict(document())
api.config.phases.coverage.enabled = "FOLIO_EXAMPLES" in os.environ  # each limit of each field: minutes


@pytest.fixture(scope="module")
def url(server: Server):
    yield server.url
    assert httpx.get(server.url + "/health_generate", timeout=HANG).status_code == 200
    assert httpx.get(server.url + "/server_info?check=true", timeout=HANG).json()["engine_restarts"] == 0


@api.parametrize()
@settings(max_examples=EXAMPLES_EACH, derandomize="FOLIO_EXAMPLES" not in os.environ)
def test_every_route_does_what_it_says(case, url):
    if case.meta.generation.mode == GenerationMode.POSITIVE:
        keep_few_fields(case)
    response = case.call(base_url=url, timeout=HANG)
    assert response.status_code < 500, response.text
    case.validate_response(response, checks=CHECKS)


def keep_few_fields(case) -> None:
    """Of a body that says everything at once, no route takes all: a request has one constraint, one prompt, and so on."""
    bodies = [case.body] if isinstance(case.body, dict) else []
    bodies += [body["sampling_params"] for body in bodies if isinstance(body.get("sampling_params"), dict)]
    needed = {"messages", "prompt", "input", "text", "tokens", "sampling_params"}
    for body in bodies:
        optional = sorted(body.keys() - needed)
        keep = needed | set(Random(repr(optional)).sample(optional, min(2, len(optional))))
        for name in body.keys() - keep:
            del body[name]


# ---- the document


def operations(whole: dict) -> list[tuple[str, dict]]:
    return [(path, operation) for path, methods in whole["paths"].items() for operation in methods.values()]


def test_every_route_is_described():
    whole = document()
    assert {path for path, _ in operations(whole)} >= {"/", "/generate", "/metrics", "/debug/events", "/v1/models"}
    for path, operation in operations(whole):
        assert operation["summary"] and operation["description"] and operation["tags"], path
        assert {"200", "413", "500", "504"} <= operation["responses"].keys(), path
        assert "422" not in operation["responses"] and "401" not in operation["responses"], path
        assert ("400" in operation["responses"]) >= ("requestBody" in operation), path


def test_every_field_of_a_request_has_its_words_and_they_all_have_a_field():
    schemas, named = document()["components"]["schemas"], set()
    for title in ("SGLangParams", *EXAMPLES):
        for name, field in schemas[title]["properties"].items():
            assert field.get("description") == WORDS[name], (title, name)
            named.add(name)
    assert named == set(WORDS)


@pytest.mark.parametrize(
    ("title", "name", "low", "high"),
    [
        ("ChatRequest", "temperature", 0, 100),
        ("ChatRequest", "n", 1, 128),
        ("ChatRequest", "top_k", -1, 2**31 - 1),
        ("CompletionRequest", "max_tokens", 0, 2**31 - 1),
        ("SGLangParams", "max_new_tokens", 0, 2**31 - 1),
        ("GenerateRequest", "top_logprobs_num", 0, 20),
    ],
)
def test_a_number_has_its_limits(title, name, low, high):
    field = document()["components"]["schemas"][title]["properties"][name]
    number = next(kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null")
    assert (number["minimum"], number["maximum"]) == (low, high)


def test_a_server_with_a_key_says_where_it_is_wanted():
    whole = document(api_key="secret")
    wanted = {
        path for path, operation in operations(whole) if "security" in operation and "401" in operation["responses"]
    }
    assert wanted == set(whole["paths"]) - {"/", "/health"}
    assert whole["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
