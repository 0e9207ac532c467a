"""Logprobs in the two shapes of the OpenAI API: a list of records for a chat, four parallel lists for a completion.

python -m pytest tests/test_openai_api.py
"""

from collections.abc import Sequence

from scheduler.request import TokenLogprob
from serving.openai_shapes import ChatLogprob, CompletionLogprobs, TopLogprob
from tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> list[ChatLogprob]:
    return [
        {
            **_record(tokenizer, token.token_id, token.logprob),
            "top_logprobs": [_record(tokenizer, id, logprob) for id, logprob in token.top],
        }
        for token in tokens
    ]


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob | int], offset: int) -> CompletionLogprobs:
    """offset: where in the text the first of them begins. A bare id is a token of which nothing is known."""
    lists: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        known = not isinstance(token, int)
        text = _text(tokenizer, token.token_id if known else token)
        lists["tokens"].append(text)
        lists["token_logprobs"].append(token.logprob if known else None)
        top = {_text(tokenizer, id): logprob for id, logprob in token.top} if known else None
        lists["top_logprobs"].append(top)
        lists["text_offset"].append(offset)
        offset += len(text)
    return lists


def _record(tokenizer: Tokenizer, id: int, logprob: float) -> TopLogprob:
    text = _text(tokenizer, id)
    whole = "\ufffd" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _text(tokenizer: Tokenizer, id: int) -> str:
    """The model's vocabulary is often padded beyond the tokenizer's."""
    return tokenizer.token_text(id) if id < tokenizer.vocab_size else ""
