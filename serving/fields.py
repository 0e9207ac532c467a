"""What the fields of a request mean, and their limits, for /openapi.json: one name means the same on every route.

SamplingParams checks what is said here of its numbers; both read the same table.

    python -m pytest tests/test_server_schema.py
"""

from typing import Any

from kernels.widths import MAX_BIAS, MAX_STOP_IDS, TOP_LOGPROBS
from scheduler.request import ABOVE_ZERO, MAX_STOP_CHARS, MAX_STOP_STRINGS, MOST_BIAS, RANGES

SAME_AS = {  # field -> what SamplingParams calls it, where that is another name
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "sampling_seed": "seed",
    "top_logprobs": "logprobs",
    "top_logprobs_num": "logprobs",
}
LOWER = {"top_k": -1, "logprob_start_len": -1}  # what is not SamplingParams' least: off, as SGLang says it
SALT = "Share cached prefixes only with requests of the same salt."
PRIORITY = "Who goes first (the lower), if the server was started with --schedule-policy priority."
RID = "A name for the request, to abort it by."
CHOICE = "The text is one of these."
EBNF = "The text follows this grammar, in xgrammar's EBNF; its first rule is `root`."
REGEX = "A regular expression that the whole text matches."
SCHEMA = "A JSON schema that the text keeps to."
WORDS = {
    # what is asked
    "model": "The served name; leave it out, or see /v1/models.",
    "messages": "The chat so far. Roles: system, developer (as system), user, assistant, tool.",
    "prompt": "A text, several texts, token ids, or several lists of them.",
    "input": "A text, several texts, token ids, or several lists of them.",
    "text": "The prompt, or a batch of them; or else input_ids.",
    "input_ids": "The prompt as token ids, or a batch of them; or else text.",
    "sampling_params": "How to choose tokens and when to stop; in a batch, also a list with one for each prompt.",
    "tokens": "Token ids, or several lists of them.",
    "add_special_tokens": "Put before the text what the tokenizer puts there, such as a token for its beginning.",
    "abort_all": "All requests; then without rid.",
    "user": "Whom the client asks for. It changes nothing, and no record is kept.",
    "rid": RID,
    "cache_salt": SALT,
    "priority": PRIORITY,
    # how much of it
    "max_tokens": "New tokens at most; 0: none. Default: 16 for a completion, what the context leaves for a chat.",
    "max_completion_tokens": "The newer name of max_tokens.",
    "max_new_tokens": "New tokens at most; 0: none.",
    "min_tokens": "New tokens at least: nothing stops the text before.",
    "min_new_tokens": "New tokens at least: nothing stops the text before.",
    "n": "How many texts for each prompt.",
    "stop": f"A text, or up to {MAX_STOP_STRINGS} of {MAX_STOP_CHARS} characters, that end the answer and are not part of it.",
    "stop_token_ids": f"Token ids that end the text: with the model's own, {MAX_STOP_IDS} at most.",
    "ignore_eos": "Do not stop where the model wants to.",
    "echo": "Begin with the prompt. With logprobs (and n 1) its tokens have theirs, and max_tokens may be 0.",
    # how tokens are chosen
    "temperature": "0: always the likeliest token.",
    "top_k": "Only among the k likeliest; 0 or -1: off.",
    "top_p": "Only among the likeliest that have this probability together.",
    "min_p": "Only those that have at least this share of the likeliest one's probability.",
    "repetition_penalty": "Above 1: what the prompt or the text has already becomes less likely.",
    "presence_penalty": "What the text has already becomes less likely, however often it has it.",
    "frequency_penalty": "What the text has already becomes less likely, by how often it has it.",
    "logit_bias": f"Token id -> what is added to its logit, {-MOST_BIAS} to {MOST_BIAS}; {MAX_BIAS} entries at most.",
    "seed": "The same text again, whoever else is served at the time.",
    "sampling_seed": "The same as seed.",
    # what the text must be
    "response_format": "text, json_object, json_schema (always kept to), or structural_tag with a format.",
    "json_schema": SCHEMA,
    "guided_json": SCHEMA,
    "json_object": "The text is a JSON object.",
    "regex": REGEX,
    "guided_regex": REGEX,
    "ebnf": EBNF,
    "guided_grammar": EBNF,
    "choice": CHOICE,
    "choices": CHOICE,
    "guided_choice": CHOICE,
    "structural_tag": "Text with parts that are held to something, in xgrammar's notation.",
    "json_finish": "Bring JSON to a valid end before the tokens run out.",
    "disable_any_whitespace": 'JSON with ", " and ": " and no other white space.',
    "tools": "Functions that the model may call; their schemas are kept to, unless `strict` is false.",
    "tool_choice": "none: the model is not shown the tools; auto; required: a call and nothing else; or one function.",
    "parallel_tool_calls": "false: one call at most.",
    "reasoning_effort": "If the model's chat template has that variable.",
    "chat_template_kwargs": "Variables that the model's chat template has.",
    # what comes back
    "stream": "Server-sent events as the text comes, the last of them [DONE].",
    "stream_options": "For a stream: include_usage adds an event with the usage.",
    "logprobs": f"Chat: true for those of the answer's tokens. Completion: also of the likeliest few, up to {TOP_LOGPROBS}.",
    "top_logprobs": "How many alternatives with each token; with logprobs.",
    "return_logprob": "The log probability of each token, in meta_info.",
    "top_logprobs_num": "How many alternatives with each token; with return_logprob.",
    "logprob_start_len": "With return_logprob: also of the prompt's tokens, from this position on. -1: of the output only.",
    "return_text_in_logprobs": "Their text, too.",
    "skip_special_tokens": "Leave control tokens out of the text.",
    "encoding_format": "base64: of float32, little-endian.",
    "pooling": "mean: of the hidden states of all tokens (the default); last: that of the last one.",
    # what SGLang's clients send, and has one value here
    "lora_path": "There are no adapters.",
    "image_data": "There are no images.",
    "no_stop_trim": "What stops a text is never part of it.",
    "spaces_between_special_tokens": "As the tokenizer has them.",
}

CHAT = [{"role": "user", "content": "Tell me a story."}]
EXAMPLES = {  # of requests
    "ChatRequest": {"messages": CHAT, "max_tokens": 40, "temperature": 0.7, "seed": 1},
    "CompletionRequest": {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "logprobs": 2},
    "EmbeddingRequest": {"input": ["Once upon a time", "The end"]},
    "GenerateRequest": {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 16, "temperature": 0}},
    "AbortRequest": {"abort_all": True},
    "TokenizeRequest": {"prompt": "Once upon a time"},
    "DetokenizeRequest": {"tokens": [5, 6, 7]},
}


def describe_fields(schema: dict[str, Any]) -> None:
    """Put words, limits and an example to a JSON schema that pydantic has made (its `json_schema_extra`)."""
    if schema.get("title") in EXAMPLES:
        schema["examples"] = [EXAMPLES[schema["title"]]]
    for name, field in schema.get("properties", {}).items():
        if name in WORDS:
            field["description"] = WORDS[name]
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("integer", "number"):
                kind |= limits(name)


def limits(field: str) -> dict[str, float]:
    """Those of a number, as JSON schema says them; none if there are none."""
    name = SAME_AS.get(field, field)
    if name in ABOVE_ZERO:
        return {"exclusiveMinimum": 0, "maximum": ABOVE_ZERO[name]}
    low, high = RANGES.get(name, (None, None))
    return {} if low is None else {"minimum": LOWER.get(field, low), "maximum": high}
