"""Programs on a server, through SGLang's native API: ours (`python server.py`) or SGLang's.

    set_default_backend(RuntimeEndpoint("http://localhost:30000"))

A chat is rendered here, so the checkpoint's tokenizer must be on this machine: the server says where its own is, or `tokenizer`
does.
The key is read from the environment, when a request is sent, and kept nowhere.

    python -m pytest tests/test_lang_examples.py
"""

import json
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from errors import UserError
from lang.backend import Backend, BackendError, Cancel, Piece, begin_of_choice
from lang.choices import Score
from lang.ir import RETURNS
from lang.transcript import Messages, Transcript
from tokenizer import Tokenizer

READ_ONLY = {"max_new_tokens": 0}
ABORTS = 20  # at most, of one request


class RuntimeEndpoint(Backend):
    """base_url: of the server. api_key_env: the environment variable with its key. tokenizer: a checkpoint's folder."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key_env: str = "FOLIO_API_KEY",
        tokenizer: str | Path | None = None,
        timeout: float = 600.0,
    ):
        super().__init__()
        self._http = httpx.Client(
            base_url=base_url,
            timeout=timeout,
            auth=EnvironmentKey(api_key_env),
            limits=httpx.Limits(max_connections=None),
        )
        self.model_info = self._get("/get_model_info")
        folder = Path(tokenizer or self.model_info.get("tokenizer_path") or "")
        self._tokenizer = (
            Tokenizer.from_pretrained(folder) if tokenizer or (folder / "tokenizer.json").is_file() else None
        )

    def flush_cache(self) -> None:
        self._post("/flush_cache", {})

    def get_server_info(self) -> dict[str, Any]:
        return self._get("/get_server_info")

    def render(self, messages: Messages, open_assistant: bool) -> str:
        if self._tokenizer is None:
            raise UserError("a chat needs the checkpoint's chat template: RuntimeEndpoint(url, tokenizer=FOLDER)")
        return self._tokenizer.render_chat(messages, add_generation_prompt=open_assistant)

    def generate(self, prompt: Transcript, params: dict[str, Any], stream: bool, cancel: Cancel) -> Iterator[Piece]:
        rid = uuid.uuid4().hex
        body = self._prompt(prompt) | {
            "sampling_params": {name: value for name, value in params.items() if name not in RETURNS},
            "rid": rid,
            **{name: value for name, value in params.items() if name in RETURNS},
        }
        over = threading.Event()
        try:
            with cancel.ends(partial(self._abort, rid, over)):
                seen: dict[int, str] = {}
                for i, said in self._streamed(body) if stream else enumerate(as_list(self._post("/generate", body))):
                    new, seen[i] = said["text"][len(seen.get(i, "")) :], said["text"]
                    self._count(said["meta_info"])
                    yield Piece(new, said["meta_info"], i)
        finally:
            over.set()

    def _abort(self, rid: str, over: threading.Event) -> None:
        """More than once, for the server may not have heard of it yet."""

        def insist() -> None:
            for _ in range(ABORTS):
                with suppress(BackendError):
                    self._post("/abort_request", {"rid": rid})
                if over.wait(0.05):
                    return

        threading.Thread(target=insist, daemon=True).start()

    def score(self, prompt: Transcript, choices: Sequence[str], unconditional: bool) -> list[Score]:
        texts = [prompt.text, *(prompt.text + choice for choice in choices)]
        before, *prompts = self._post("/tokenize", {"prompt": texts, "add_special_tokens": not prompt.is_chat})[
            "tokens"
        ]
        starts = [begin_of_choice(before, ids) for ids in prompts]
        lengths = [len(ids) - start for ids, start in zip(prompts, starts, strict=True)]
        tokens = self._last_logprobs(prompts, lengths, max(0, min(starts) - 1))
        alone = [None] * len(choices)
        if unconditional:
            own = self._last_logprobs(
                [ids[-n:] for ids, n in zip(prompts, lengths, strict=True)], [n - 1 for n in lengths], 0
            )
            alone = [[0.0, *(logprob for logprob, *_ in row)] for row in own]
        return [Score(row, without) for row, without in zip(tokens, alone, strict=True)]

    def _last_logprobs(self, prompts: list[list[int]], lengths: list[int], start: int) -> list[list[tuple]]:
        """(logprob, id, text) of the last tokens of each prompt; `start`: from where on they are to be told."""
        asked = {"return_logprob": True, "logprob_start_len": start, "return_text_in_logprobs": True}
        said = as_list(self._post("/generate", {"input_ids": prompts, "sampling_params": READ_ONLY} | asked))
        told = [one["meta_info"]["input_token_logprobs"] for one in said]
        return [[tuple(token) for token in row[len(row) - n :]] for row, n in zip(told, lengths, strict=True)]

    def hold(self, prompt: Transcript) -> AbstractContextManager[None]:
        """Computed first; the server cannot be told to keep it."""
        self._post("/generate", self._prompt(prompt) | {"sampling_params": READ_ONLY})
        return nullcontext()

    def _prompt(self, prompt: Transcript) -> dict[str, Any]:
        text = prompt.text
        if prompt.is_chat:  # its template writes the special tokens, and the server would add them again
            return {"input_ids": self._tokenizer.encode(text, add_special_tokens=False)}
        return {"text": text}

    def _count(self, meta: dict[str, Any]) -> None:
        if meta.get("finish_reason") is not None:
            self.token_usage.add(
                calls=1, prompt_tokens=meta["prompt_tokens"], completion_tokens=meta["completion_tokens"]
            )

    # ---- HTTP

    def _get(self, path: str) -> Any:
        return _answer(_sent(partial(self._http.get, path)))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return _answer(_sent(partial(self._http.post, path, json=body)))

    def _streamed(self, body: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with self._http.stream("POST", "/generate", json=body | {"stream": True}) as response:
                if response.status_code != 200:
                    response.read()
                    _answer(response)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        said = json.loads(line.removeprefix("data: "))
                        if "error" in said:
                            raise BackendError(said["error"]["message"])
                        yield said.get("index", 0), said
        except httpx.HTTPError as error:
            raise _failed(error) from None


class EnvironmentKey(httpx.Auth):
    """Reads the key when a request is sent, so that no object has it."""

    def __init__(self, variable: str):
        self.variable = variable

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:
        if key := os.environ.get(self.variable):
            request.headers["Authorization"] = f"Bearer {key}"
        yield request


def as_list(said: Any) -> list[Any]:
    return said if isinstance(said, list) else [said]


def _sent(send: partial) -> httpx.Response:
    try:
        return send()
    except httpx.HTTPError as error:
        raise _failed(error) from None


def _failed(error: httpx.HTTPError) -> BackendError:
    return BackendError(f"{error.request.url}: {type(error).__name__}: {error}")


def _answer(response: httpx.Response) -> Any:
    """UserError for what the server refuses, BackendError for what else goes wrong."""
    try:
        said = response.json()
    except ValueError:
        said = None
    if response.is_success:
        return said
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else error or response.text
    kind = UserError if response.status_code in (400, 413, 422) else BackendError
    raise kind(f"{message} (status {response.status_code})")
