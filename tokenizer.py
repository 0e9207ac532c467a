"""Text <-> token ids for one checkpoint folder: tokenizer, chat template, incremental detokenizer.

    tokenizer = Tokenizer.from_pretrained("path/to/checkpoint")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    stream = tokenizer.detokenizer()
    for token in generate(ids):
        print(stream.add([token]), end="")
    print(stream.finish())

It stands on the `tokenizers` library alone: importing `transformers` for its `AutoTokenizer` would cost more than a
second before the first token. From a tokenizer.json the ids are those of `AutoTokenizer` (transformers 5); where there
is only a sentencepiece `tokenizer.model` they are those of sentencepiece. No code of a checkpoint is run but its chat
template, in jinja's sandbox.

Tests: `pytest tests/test_tokenizer.py` (against transformers and sentencepiece; property tests of the detokenizer).
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from detokenizer import Detokenizer, clean_up
from errors import UserError
from sentencepiece_file import load_sentencepiece, sentencepiece_decoder

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(UserError):
    """A tokenizer that cannot be read, or input it cannot take. The message is fit to be shown to a user."""


class Tokenizer:
    """The tokenizer of one checkpoint; build it with `from_pretrained`. Safe to share between threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special: dict[str, str], templates: dict[str, str], clean: bool = False
    ):
        """`special`: {"bos_token": "<s>", ...}. `templates`: name -> jinja source. `clean`: tidy spaces in decode."""
        self.backend, self._special, self._templates, self._clean = backend, special, templates, clean
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.bos_token_id: int | None = backend.token_to_id(special.get("bos_token", ""))
        eos = backend.token_to_id(special.get("eos_token", ""))
        self.eos_token_ids: set[int] = set() if eos is None else {eos}
        self._byte_fallback = backend.decoder is not None and b'"ByteFallback"' in backend.decoder.__getstate__()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Reads a checkpoint folder. Raises TokenizerError naming the folder or file that is missing or unreadable."""
        path = Path(path)
        if not path.is_dir():
            raise TokenizerError(f"no tokenizer: {path} is not a folder")
        files = [file for file in (path / "tokenizer.json", path / "tokenizer.model") if file.is_file()]
        if not files:
            raise TokenizerError(f"no tokenizer in {path}: looked for tokenizer.json and tokenizer.model")
        reading = path / "tokenizer_config.json"
        try:
            config = _read_json(reading)
            if "added_tokens_decoder" not in config:  # the older layout; never both, as in transformers
                config |= _read_json(path / "special_tokens_map.json")
            special = {name: _content(config[name]) for name in SPECIAL_NAMES if config.get(name)}
            templates = _read_templates(path, config)
            reading = files[0]
            if reading.suffix == ".json":
                backend = tokenizers.Tokenizer.from_file(str(reading))
                _use_llama_pieces(backend, config, _read_json(path / "config.json"))
            else:
                backend, special = load_sentencepiece(reading.read_bytes(), config, special)
            reading = path
            _add_tokens(backend, config, special)
        except Exception as error:  # `tokenizers` raises plain Exception, and malformed files nearly anything
            raise TokenizerError(f"cannot read {reading}: {error!r}") from error
        # A length limit or padding saved in tokenizer.json must not cut or fill a prompt.
        backend.no_truncation()
        backend.no_padding()
        # Like transformers: the clean-up was made for WordPiece, and would eat real spaces of a BPE text.
        clean = bool(config.get("clean_up_tokenization_spaces")) and not isinstance(backend.model, models.BPE)
        return cls(backend, special, templates, clean)

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included. The model's own vocabulary is often padded beyond it."""
        return max(self.backend.get_vocab().values(), default=-1) + 1

    @property
    def chat_template(self) -> str | None:
        """The jinja source used for a chat without tools, or None."""
        return self._templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the BOS/EOS that the checkpoint asks for. A special token written in `text` is one id."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # also how `tokenizers` reports half a surrogate pair, which json.loads lets through
            raise TokenizerError("cannot encode: the text is not a string of valid Unicode") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Raises TokenizerError for an id outside [0, vocab_size); an unused id inside it is no text."""
        self.check(ids)
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self._clean else text

    def check(self, ids: Sequence[int]) -> None:
        """Raises TokenizerError for an id outside [0, vocab_size)."""
        for i in ids:
            if not 0 <= i < 1 << 32 or (self.backend.id_to_token(i) is None and i >= self.vocab_size):
                raise TokenizerError(f"token id {i} is outside the vocabulary of {self.vocab_size} ids")

    def token_text(self, id: int) -> str:
        """One token as text, for logprobs: a leading space is kept, a part of a character reads U+FFFD."""
        self.check([id])
        # Decoded behind another token, because most decoders drop the space of a token that comes first.
        before, both = (self.backend.decode(x, skip_special_tokens=False) for x in (self._anchor, [*self._anchor, id]))
        return both[len(before) :]

    @cached_property
    def _anchor(self) -> list[int]:
        return self.encode("a", add_special_tokens=False)[-1:]

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A new stream of text for one sequence of generated ids."""
        return Detokenizer(self, skip_special_tokens)

    def render_chat(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt text of a chat; `kwargs` are variables of the template (`enable_thinking=False`).

        Raises TokenizerError if there is no template or it refuses the chat, with the template's own message.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TokenizerError(f"no chat template {name!r}; this tokenizer has {sorted(self._templates) or 'none'}")
        if not messages:
            raise TokenizerError("a chat needs at least one message")
        # OpenAI clients send `"content": null`; a template takes an absent key, but writes None out as text.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        names = {"documents": None, **self._special, **kwargs}
        try:
            template = _compile_template(self._templates[name])
            return template.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **names)
        except Exception as error:  # a program from the checkpoint ran on data from a client: anything may be raised
            raise TokenizerError(f"the chat template failed: {error or type(error).__name__}") from error

    def apply_chat_template(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of `render_chat`. The template writes its own BOS; no second one is added."""
        return self.encode(self.render_chat(messages, tools, add_generation_prompt, **kwargs), add_special_tokens=False)


def _read_json(path: Path) -> dict:
    """The JSON object in a file; {} if there is no such file."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(value, dict):
        raise TypeError(f"{path.name} is not a JSON object")
    return value


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _add_tokens(backend: tokenizers.Tokenizer, config: dict, special: dict[str, str]) -> None:
    """Tokens that only tokenizer_config.json has; its lstrip, rstrip, special... win over those of tokenizer.json."""
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = [AddedToken(**{k: v for k, v in listed[i].items() if k in fields}) for i in sorted(listed)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = [*special.values(), *(_content(token) for token in (extra.values() if isinstance(extra, dict) else extra))]
    known = {token.content for token in [*tokens, *backend.get_added_tokens_decoder().values()]}
    tokens += [AddedToken(name, special=True) for name in dict.fromkeys(names) if name not in known]
    for token in tokens:
        token.special = token.special or token.content in special.values()
    backend.add_tokens(tokens)


def _read_templates(path: Path, config: dict) -> dict[str, str]:
    """Template name -> source, from wherever a checkpoint keeps them; files win over tokenizer_config.json."""
    source = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    templates = {"default": source} if isinstance(source, str) else dict(source or {})
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()} or templates


@lru_cache(maxsize=16)
def _compile_template(source: str) -> Any:
    """A jinja template, in the environment that transformers gives to chat templates (chat_template_utils.py)."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what to train on; here its body is just text."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)  # jinja's own would escape HTML characters

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return env.from_string(source)


def _use_llama_pieces(backend: tokenizers.Tokenizer, config: dict, model_config: dict) -> None:
    """Where transformers 5 would load its LlamaTokenizer class, splits text as that does, not as tokenizer.json says.

    The two differ for text that starts with a space, or (`legacy: false`) follows a special token.
    """
    parts = [part.__getstate__() for part in (backend.pre_tokenizer, backend.decoder) if part]
    if (
        config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast")
        or model_config.get("model_type", "llama") != "llama"
        or not isinstance(backend.model, models.BPE)
        or any(b'"ByteLevel"' in part for part in parts)
    ):
        return
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = "never" if not prefix else "always" if config.get("legacy", False) else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    backend.decoder = sentencepiece_decoder(prefix)
