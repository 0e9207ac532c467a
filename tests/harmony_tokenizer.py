"""A tokenizer with the control tokens of gpt-oss, put on top of the bundled one, and a template that shows what it is given."""

from pathlib import Path

from tokenizers import AddedToken

from grammar.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from tokenizer import Tokenizer

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.thinking or '' }}|{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}to=functions.{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|end|>{% endfor %}<|start|>assistant{# <|channel|> #}"
)


def harmony_tokenizer() -> tuple[Tokenizer, list[int]]:
    """-> it, and the ids that end a text: <|return|> and <|call|>."""
    backend = type(plain := Tokenizer.from_pretrained(TINY).backend).from_str(plain.to_str())
    backend.add_tokens(
        [AddedToken(mark, special=True) for mark in (START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL)]
    )
    tokenizer = Tokenizer(backend, {}, {"default": TEMPLATE})
    return tokenizer, [backend.token_to_id(RETURN), backend.token_to_id(CALL)]
