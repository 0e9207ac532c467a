"""Programs on models that somebody else serves: OpenAI's API and what speaks it, and through `litellm` most others.

    set_default_backend(OpenAI("gpt-4o"))
    set_default_backend(LiteLLM("anthropic/claude-sonnet-4-5"))
    set_default_backend(OpenAI("folio-tiny", base_url="http://localhost:30000/v1", extras=True))      # our own server

Plain text is sent as a completion, turns as a chat. What such an API cannot do is refused before a request is sent. Keys come from
the environment, where the libraries look for them; what is raised has none in it.

    pip install "folio-llm[remote]"
    python -m pytest tests/test_lang_remote.py
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from errors import UserError
from lang.backend import Backend, BackendError, Cancel, Piece, begin_of_choice
from lang.choices import Score
from lang.transcript import Messages, Transcript

SAME = ("n", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop")
EXTRAS = {  # what vLLM, SGLang and our server know besides
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "stop_token_ids": "stop_token_ids",
    "regex": "regex",
    "ebnf": "ebnf",
    "json_finish": "json_finish",
    "disable_any_whitespace": "disable_any_whitespace",
}


class Remote(Backend):
    """An API with chats and completions in OpenAI's form.

    extras: it also knows EXTRAS, schemas in completions, and `echo` with logprobs, by which choices are scored.
    """

    continues_turns = False

    def __init__(self, model_name: str, extras: bool = False):
        super().__init__()
        self.model_name, self.extras = model_name, extras

    def _chat(self, **body: Any) -> Any:
        raise NotImplementedError

    def _complete(self, **body: Any) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_name!r})"

    def check(self, params: dict[str, Any]) -> None:
        for name in params:
            if name in EXTRAS and not self.extras:
                raise UserError(f"{name} is not to be had from {self!r}: it is no part of the OpenAI API")

    def check_select(self, unconditional: bool) -> None:
        if not self.extras:
            raise UserError(f"select is not to be had from {self!r}: it does not tell how likely given tokens are")
        if unconditional:
            raise UserError("unconditional_likelihood_normalized needs an Engine or a RuntimeEndpoint")

    def render(self, messages: Messages, open_assistant: bool) -> str:
        """To be read by people; the API renders its own."""
        said = "".join(f"{message['role'].upper()}: {message['content']}\n" for message in messages)
        return said + "ASSISTANT: " * open_assistant

    def generate(self, prompt: Transcript, params: dict[str, Any], stream: bool, cancel: Cancel) -> Iterator[Piece]:
        send, body = (self._chat_of(prompt, params)) if prompt.is_chat else (self._completion_of(prompt.text, params))
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        cancel.check()
        for said in self._sent(send, body, stream):
            cancel.check()
            usage = getattr(said, "usage", None)
            counts = {} if usage is None else {
                "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens or 0,
            }  # fmt: skip
            self.token_usage.add(**counts)
            for choice in said.choices:
                reason = choice.finish_reason and {"type": choice.finish_reason}
                meta = {"finish_reason": reason, "logprobs": getattr(choice, "logprobs", None)} | counts
                yield Piece(_text_of(choice), meta, choice.index)

    def score(self, prompt: Transcript, choices: Sequence[str], unconditional: bool) -> list[Score]:
        if prompt.is_chat:
            raise UserError("select in a chat is not to be had from this API; write the prompt as plain text")
        texts = [prompt.text, *(prompt.text + choice for choice in choices)]
        body = {"model": self.model_name, "prompt": texts, "echo": True, "logprobs": 0, "max_tokens": 0}
        [said] = self._sent(self._complete, body, False)
        before, *told = [choice.logprobs for choice in sorted(said.choices, key=lambda choice: choice.index)]
        starts = [begin_of_choice(before.tokens, one.tokens) for one in told]
        rows = [
            zip(one.token_logprobs[at:], one.tokens[at:], strict=True) for one, at in zip(told, starts, strict=True)
        ]
        return [Score([(logprob, None, token) for logprob, token in row]) for row in rows]

    def _chat_of(self, prompt: Transcript, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if prompt.before or prompt.role != "assistant" or prompt.turn:
            raise UserError("a chat API answers as the assistant: gen must be the first thing in its turn")
        body = self._body(params) | {"messages": prompt.chat, "max_completion_tokens": params["max_new_tokens"]}
        if params.get("return_logprob"):
            body |= {"logprobs": True, "top_logprobs": params.get("top_logprobs_num", 0)}
        return self._chat, body

    def _completion_of(self, text: str, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "json_schema" in params and not self.extras:
            raise UserError(
                "json_schema is not to be had in a completion of the OpenAI API; write the prompt as a chat"
            )
        body = self._body(params) | {"prompt": text, "max_tokens": params["max_new_tokens"]}
        if params.get("return_logprob"):
            body["logprobs"] = params.get("top_logprobs_num", 0)
        return self._complete, body

    def _body(self, params: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self.model_name} | {name: params[name] for name in SAME if name in params}
        if "json_schema" in params:
            schema = {"name": "answer", "schema": json.loads(params["json_schema"]), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        more = {theirs: params[name] for name, theirs in EXTRAS.items() if name in params}
        return body | ({"extra_body": more} if more else {})

    def _sent(self, send: Any, body: dict[str, Any], stream: bool) -> Iterator[Any]:
        """The answer, or its parts. BackendError for what goes wrong, without what may be in it of a key."""
        self.token_usage.add(calls=1)
        try:
            said = send(**body)
            yield from said if stream else [said]
        except GeneratorExit:
            raise
        except Exception as error:
            raise BackendError(without_keys(f"{type(error).__name__}: {error}")) from None


class OpenAI(Remote):
    """OpenAI, or a server that speaks its API. The key: OPENAI_API_KEY, or whatever variable `api_key_env` names."""

    def __init__(
        self,
        model_name: str,
        *,
        base_url: str | None = None,
        extras: bool = False,
        api_key_env: str = "OPENAI_API_KEY",
        **options: Any,
    ):
        import openai

        if "api_key" in options:
            raise UserError(
                f"a key is given to no object here; put it into the environment, as {api_key_env} or what api_key_env names"
            )
        super().__init__(model_name, extras)
        key = os.environ.get(api_key_env) or (None if base_url is None else "none")
        if key is None:
            raise UserError(f"there is no key for OpenAI: set {api_key_env}")
        try:
            client = openai.OpenAI(base_url=base_url, api_key=key, **options)
        except TypeError as error:  # an option that it does not have
            raise UserError(str(error)) from None
        self._chat, self._complete = client.chat.completions.create, client.completions.create


class LiteLLM(Remote):
    """Whatever `litellm` knows, by its names: "anthropic/...", "gemini/...", "vertex_ai/...". options: of its calls."""

    def __init__(self, model_name: str, *, extras: bool = False, **options: Any):
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else the import asks the network for prices
        try:
            import litellm
        except ImportError:
            raise UserError('LiteLLM, Anthropic and VertexAI need litellm: pip install "folio-llm[remote]"') from None
        if "api_key" in options:
            raise UserError("a key is given to no object here; put it into the environment, where litellm looks for it")
        super().__init__(model_name, extras)
        litellm.suppress_debug_info = True
        self._known = litellm.get_supported_openai_params(model=model_name) or []
        self._options, self._litellm = options, litellm

    def check(self, params: dict[str, Any]) -> None:
        super().check(params)
        wanted = {"json_schema": "response_format", "return_logprob": "logprobs"}
        names = {wanted.get(name, name) for name in params if name in SAME or name in wanted}
        if unknown := sorted(names - set(self._known)):
            raise UserError(f"{unknown[0]} is not to be had from {self!r}")

    def _chat(self, **body: Any) -> Any:
        return self._litellm.completion(**body, **self._options)

    def _complete(self, **body: Any) -> Any:
        return self._litellm.text_completion(**body, **self._options)


def Anthropic(model_name: str, **options: Any) -> LiteLLM:
    return LiteLLM(f"anthropic/{model_name}", **options)


def VertexAI(model_name: str, **options: Any) -> LiteLLM:
    return LiteLLM(f"vertex_ai/{model_name}", **options)


def without_keys(text: str) -> str:
    """A message without the values of the environment's keys, should a library have put one in."""
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET")):
            text = text.replace(value, "***")
    return text


def _text_of(choice: Any) -> str:
    said = getattr(choice, "message", None) or getattr(choice, "delta", None)
    return (getattr(choice, "text", None) if said is None else said.content) or ""
