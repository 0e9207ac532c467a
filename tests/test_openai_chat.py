"""A chat becomes a prompt: what a template is given, and what keeps the answer to its tools, its schema, its thought.

python -m pytest tests/test_openai_chat.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from errors import UserError
from grammar.compiler import Compiler
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from serving.api_errors import ApiError
from serving.chat import Chats, Prompt
from serving.openai_protocol import ChatRequest
from tokenizer import Tokenizer

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"
HI = [{"role": "user", "content": "Hi"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NUMBER = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}}
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{{ tools or '' }}"
    '<tool_call>"arguments"</tool_call>{{ reasoning_effort or "" }}\n{{ "" if enable_thinking is false else thought }}'
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    with Compiler(Vocabulary.of(tokenizer, tokenizer.vocab_size, [0, 2])) as compiler:
        yield compiler


def chats(tokenizer: Tokenizer, thought: str, parser: str) -> Chats:
    """Of a model whose prompts end in `thought`."""
    template = TEMPLATE.replace("thought", repr(thought))
    return Chats(Tokenizer(tokenizer.backend, {}, {"default": template}), reasoning_parser=parser)


def ask(chats: Chats, **fields: Any) -> Prompt:
    return chats.prompt(ChatRequest.model_validate({"messages": HI} | fields))


def takes(compiler: Compiler, prompt: Prompt, text: str) -> bool:
    """May the answer be this?"""
    matcher = compiler.compile(Spec.structural_tag(prompt.params["structural_tag"])).result().matcher()
    return all(map(matcher.accept, compiler.vocabulary.encode(text))) and matcher.complete


# ---- what the template is given


def test_the_prompt_is_that_of_the_tokenizer(tokenizer):
    prompt = ask(Chats(tokenizer), tools=TOOLS)
    assert prompt.ids == tokenizer.apply_chat_template(HI, tools=TOOLS)
    assert prompt.tools == TOOLS


def test_tools_that_may_not_be_called_are_not_shown(tokenizer):
    prompt = ask(Chats(tokenizer), tools=TOOLS, tool_choice="none")
    assert prompt.ids == tokenizer.apply_chat_template(HI)
    assert prompt.tools == [] and "structural_tag" not in prompt.params


def test_a_template_gets_the_variables_that_it_has(tokenizer):
    thinking = chats(tokenizer, "<think>\n", "qwen3")
    text = tokenizer.decode(ask(thinking, reasoning_effort="much").ids, skip_special_tokens=False)
    assert text == 'user: Hi\n<tool_call>"arguments"</tool_call>much\n<think>\n'
    prompt = ask(thinking, chat_template_kwargs={"enable_thinking": False})
    assert prompt.thought_begun is None and not tokenizer.decode(prompt.ids).endswith("<think>\n")


@pytest.mark.parametrize("name", ["other", "messages", "enable", "reasoning_effort"])
def test_other_variables_are_refused(tokenizer, name):
    with pytest.raises(ApiError) as info:
        ask(chats(tokenizer, "", "qwen3"), chat_template_kwargs={name: 1})
    assert info.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(tool_call_parser="morse"), "tool_call_parser is 'morse'"),
        (dict(reasoning_parser="on"), "reasoning_parser is 'on'"),
    ],
)
def test_a_parser_that_there_is_not(tokenizer, options, says):
    with pytest.raises(UserError, match=says):
        Chats(tokenizer, **options)


def test_tools_of_a_model_that_has_none(tokenizer):
    plain = Chats(Tokenizer(tokenizer.backend, {}, {"default": "{{ messages[0].content }}"}))
    with pytest.raises(UserError, match="no tool calls of a known notation"):
        ask(plain, tools=TOOLS)
    named = Chats(plain.tokenizer, tool_call_parser="hermes")
    assert ask(named, tools=TOOLS).tools == TOOLS


# ---- what the answer may be


@pytest.mark.parametrize(
    ("thought", "parser", "takes_thought", "takes_none"),
    [
        ("<think>\n", "qwen3", "hm</think>\n\n", False),
        ("", "qwen3", "<think>hm</think>\n\n", True),
        ("", "deepseek_r1", "hm</think>\n\n", False),
        ("<think>\n\n</think>\n\n", "qwen3", None, True),
        ("", "off", None, True),
    ],
)
@pytest.mark.parametrize(
    ("fields", "answer", "wrong"),
    [
        (NUMBER, "42", "Oslo"),
        ({"regex": "[0-9]+"}, "42", "Oslo"),
        ({"choice": ["yes", "no"]}, "yes", "maybe"),
        ({"ebnf": 'root ::= "yes" | "no"'}, "no", "maybe"),
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', "[]"),
        ({"tools": TOOLS, "tool_choice": "required"}, CALL, CALL.replace("city", "town")),
        ({"tools": TOOLS}, CALL, CALL.replace("city", "town")),
        ({"tools": TOOLS, **NUMBER}, CALL, "Oslo"),
        ({"tools": TOOLS, **NUMBER}, "42", CALL.replace("city", "town")),
        ({"tools": TOOLS, "regex": "[0-9]+"}, "42", "Oslo"),
    ],
)
def test_it_holds_behind_the_thought(
    tokenizer, compiler, thought, parser, takes_thought, takes_none, fields, answer, wrong
):
    prompt = ask(chats(tokenizer, thought, parser), **fields)
    if "structural_tag" not in prompt.params:  # there is no thought to wait for: it is asked as it came
        assert takes_thought is None and len(prompt.params) == 3
        return
    assert takes(compiler, prompt, answer) == takes_none
    assert not takes(compiler, prompt, wrong)
    if takes_thought is not None:
        assert takes(compiler, prompt, takes_thought + answer)
        assert not takes(compiler, prompt, takes_thought + wrong)


def test_a_call_that_is_required_leaves_no_room_for_a_schema(tokenizer, compiler):
    prompt = ask(Chats(tokenizer), tools=TOOLS, tool_choice="required", **NUMBER)
    assert prompt.params.keys() == {"max_new_tokens", "logprobs", "structural_tag", "skip_special_tokens"}
    assert takes(compiler, prompt, CALL) and not takes(compiler, prompt, "42")


def test_control_tokens_that_tell_a_call_are_text(tokenizer):
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken("<tool_call>", special=True)])
    spoken = Chats(Tokenizer(backend, {}, {"default": TEMPLATE.replace("thought", "''")}))
    assert ask(spoken, tools=TOOLS).params["skip_special_tokens"] is False
    assert "skip_special_tokens" not in ask(spoken).params


def test_a_schema_that_is_no_json_is_refused(tokenizer):
    with pytest.raises(UserError, match="json_schema is not valid JSON"):
        ask(Chats(tokenizer), tools=TOOLS, guided_json="{")
    with pytest.raises(UserError, match="structural_tag must be"):
        ask(Chats(tokenizer), tools=TOOLS, structural_tag={})


def test_params_are_fit_for_json(tokenizer):
    params = ask(Chats(tokenizer), tools=TOOLS, stop=["a"], logit_bias={"5": 1}).params
    assert json.loads(json.dumps(params))["logit_bias"] == {"5": 1}
