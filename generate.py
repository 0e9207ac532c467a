"""Text in, text out: the main job, from the command line.

    python generate.py --compile --prompt "Once upon a time"
    echo "Once upon a time" | python generate.py --temperature 0
    python generate.py --chat

Streams the text to standard output; progress and the figures go to standard error. Exit code 2 and one line for a
mistake of the user's, 130 after Ctrl-C.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_args import add_engine_flags, engine_options
from errors import UserError
from figures import Figures, breakdown_line, figures_line
from profiling import prepare

if TYPE_CHECKING:  # torch takes seconds to import: `--help` and a mistyped flag need not wait for it
    from engine import Engine, SamplingParams
    from output import Delta


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Complete a prompt, or chat.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to go on with (default: standard input, if it is a pipe)")
    source.add_argument("--prompt-file", help="a file with the prompt")
    source.add_argument("--chat", action="store_true", help="talk: history is kept; /reset starts anew, /exit ends")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="default: 256, or what the context leaves")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest (default: 0, off)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest with this mass (default: 1, off)"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="drop what is below this share of the likeliest (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same text")
    parser.add_argument("--stop", action="append", default=[], help="end before this text (may be given several times)")
    parser.add_argument("--num-samples", type=int, default=1, help="texts to make, as one batch (default: 1)")
    output = parser.add_argument_group("structured output (one of the first six)")
    kind = output.add_mutually_exclusive_group()
    kind.add_argument("--json-schema", metavar="FILE|TEXT", help="JSON that a schema describes")
    kind.add_argument("--json-object", action="store_true", help="any JSON object")
    kind.add_argument("--regex", help="text that this matches from its beginning to its end")
    kind.add_argument("--ebnf", metavar="FILE|TEXT", help="text of a grammar, whose first rule is called root")
    kind.add_argument("--choices", nargs="+", metavar="TEXT", help="one of these texts")
    kind.add_argument("--structural-tag", metavar="FILE|TEXT", help="text with tagged parts, in xgrammar's notation")
    output.add_argument(
        "--tools", metavar="FILE|TEXT", help="with --chat: functions to call, as the OpenAI API has them"
    )
    output.add_argument(
        "--tool-choice", metavar="CHOICE", help="auto, none, required, or a function's name (default: auto)"
    )
    output.add_argument(
        "--tool-call-parser", metavar="NAME", help="how the model says a call (default: as its chat template tells)"
    )
    output.add_argument("--json-finish", action="store_true", help="end validly before the new tokens run out")
    output.add_argument("--disable-any-whitespace", action="store_true", help='JSON with ", " and ": " and no more')
    add_engine_flags(parser)
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="write torch.profiler's trace (.gz: compressed), and say where a step's time goes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quiet", action="store_true", help="only the text: no progress, no figures")
    args = parser.parse_args(argv)
    if args.chat and args.num_samples > 1:
        parser.error("--chat has one answer at a time; leave --num-samples out")
    if args.tools is not None and not args.chat:
        parser.error("--tools are shown to the model by its chat template: give --chat")
    if args.tools is None and (args.tool_choice or args.tool_call_parser):
        parser.error("--tool-choice and --tool-call-parser are about --tools, and there are none")
    if args.chat and args.json:
        parser.error("--json describes one completion; leave it out with --chat")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        prompt = None if args.chat else read_prompt(args)
        if args.profile is not None:
            prepare(args.profile)
        params, tools = sampling_params(args), read_tools(args)
        engine, figures = start(args, params)
        if args.chat:
            if tools:
                params.structural_tag = tag_of(engine, tools, args)
            with profiled(engine, args):
                chat(engine, params, tools, args, figures)
            if args.profile is not None and not args.quiet:
                print(breakdown_line(engine.stats().breakdown), file=sys.stderr)
        else:
            complete(engine, prompt, params, args, figures)
    except UserError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone: `| head`
        sys.stderr.close()
        return 0
    return 0


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text = args.prompt
    elif args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompt file {args.prompt_file}: {error}") from error
    elif not sys.stdin.isatty():
        text = sys.stdin.read().removesuffix("\n")
    else:
        raise UserError("no prompt: give --prompt, --prompt-file, --chat, or a pipe on standard input")
    if not text:
        raise UserError("the prompt is empty")
    return text


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    from scheduler.request import SamplingParams

    if args.max_new_tokens == 0:
        raise UserError("--max-new-tokens is 0; at least one is generated here")
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        n=args.num_samples,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
        json_schema=text_or_file(args.json_schema),
        json_object=args.json_object,
        regex=args.regex,
        ebnf=text_or_file(args.ebnf),
        choices=args.choices,
        structural_tag=text_or_file(args.structural_tag),
        json_finish=args.json_finish,
        disable_any_whitespace=args.disable_any_whitespace,
    )


def read_tools(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    text = text_or_file(args.tools)
    if text is None:
        return None
    try:
        tools = json.loads(text)
    except ValueError as error:
        raise UserError(f"--tools is not valid JSON: {error}") from error
    if not isinstance(tools, list) or not tools:
        raise UserError("--tools must be a JSON list of at least one function")
    return tools


def tag_of(engine: "Engine", tools: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What keeps the model to these tools, in its own notation."""
    from grammar.tools import tool_notation, tool_tag

    choice = args.tool_choice or "auto"
    if choice not in ("auto", "none", "required"):
        choice = {"type": "function", "function": {"name": choice}}
    return tool_tag(tools, args.tool_call_parser or tool_notation(engine.tokenizer.chat_template), tool_choice=choice)


def text_or_file(value: str | None) -> str | None:
    """What a file of that name holds, else the text itself."""
    try:
        if value is not None and Path(value).is_file():
            return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError):  # too long for a name, or no text inside
        return value
    if value is not None and value.endswith((".json", ".ebnf", ".gbnf")):
        raise UserError(f"there is no file {value}")
    return value


def start(args: argparse.Namespace, params: "SamplingParams") -> tuple["Engine", Figures]:
    """Load, and compile if asked to and able to."""
    from engine import Engine
    from intake import spec_of

    masked = spec_of(params) is not None or args.tools is not None
    engine = Engine.from_pretrained(max_batch_size=args.num_samples, **engine_options(args))
    figures = Figures(engine)
    if not args.quiet:
        for note in engine.notes:
            print(note, file=sys.stderr)
    if args.compile:
        try:
            shapes = engine.compile(params.greedy, args.compile, masked=masked)
            figures.time_compile(shapes, show=not args.quiet)
        except UserError as error:
            print(f"\n*** NOT COMPILED: {error}. Going on uncompiled, slower. ***\n", file=sys.stderr)
    if engine.runner.graphs and not engine.runner.compiled:
        deque(engine.warm_up(params.greedy, masked=masked), maxlen=0)
    return engine, figures


def complete(
    engine: "Engine", prompt: str, params: "SamplingParams", args: argparse.Namespace, figures: Figures
) -> None:
    """One prompt. A single sample streams; several are printed one after the other when all are done."""
    ids = engine.tokenizer.encode(prompt)
    params.max_new_tokens = params.max_new_tokens or min(256, max(1, engine.max_model_len - len(ids)))
    outputs: list[dict[str, Any]] = [{"text": "", "token_ids": [], "finish_reason": None} for _ in range(params.n)]
    single = params.n == 1
    with profiled(engine, args), engine.stream(ids, params) as stream:
        if single:
            print(prompt, end="", flush=True)
        for delta in figures.watch(unless_failed(stream), len(ids)):
            out = outputs[delta.index]
            out["text"] += delta.text
            out["token_ids"] += delta.token_ids
            out["finish_reason"] = delta.finish_reason
            if single:
                print(delta.text, end="", flush=True)
    for i, out in enumerate(outputs):
        print("" if single else f"--- {i + 1} ---\n{prompt}{out['text']}")
    measured = figures.report()
    if not args.quiet:
        print(figures_line(measured), file=sys.stderr)
        if args.profile is not None:
            print(breakdown_line(measured["breakdown"]), file=sys.stderr)
    if args.json:
        first = outputs[0] | {"prompt": prompt, "prompt_tokens": len(ids), "figures": measured}
        print(json.dumps(first | ({} if single else {"samples": outputs})))


def unless_failed(stream: "Iterable[Delta]") -> "Iterator[Delta]":
    """UserError with the engine's reason if a sample ends with an error."""
    for delta in stream:
        if delta.finish_reason == "error":
            raise UserError(str(delta.stop_reason))
        yield delta


def profiled(engine: "Engine", args: argparse.Namespace) -> AbstractContextManager[Any]:
    return nullcontext() if args.profile is None else engine.profile(args.profile)


def chat(
    engine: "Engine",
    params: "SamplingParams",
    tools: list[dict[str, Any]] | None,
    args: argparse.Namespace,
    figures: Figures,
) -> None:
    """A conversation on the terminal, or line by line from a pipe. Tools are shown and called, not carried out."""
    history: list[dict[str, str]] = []
    asked = params.max_new_tokens
    for line in user_lines(quiet=args.quiet):
        if line == "/reset":
            history.clear()
            continue
        history.append({"role": "user", "content": line})
        ids = engine.tokenizer.apply_chat_template(history, tools)
        room = engine.max_model_len - len(ids)
        if room < 1:
            history.pop()
            print(f"the conversation fills the context of {engine.max_model_len} tokens: /reset", file=sys.stderr)
            continue
        params.max_new_tokens = min(asked or 256, room)
        answer = ""
        try:
            with engine.stream(ids, params) as stream:
                for delta in figures.watch(unless_failed(stream), len(ids)):
                    answer += delta.text
                    print(delta.text, end="", flush=True)
        except KeyboardInterrupt:  # ends this answer; what was said so far stays in the history
            print(" ...", end="")
        print()
        history.append({"role": "assistant", "content": answer})


def user_lines(quiet: bool) -> Iterator[str]:
    """What the user types, until /exit or the end of the input."""
    ask = "" if quiet or not sys.stdin.isatty() else "> "
    while True:
        try:
            line = input(ask).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


if __name__ == "__main__":
    sys.exit(main())
