"""The HTTP server: OpenAI's API and SGLang's, in front of one engine.

    python server.py --compile
    curl localhost:30000/generate -H 'Content-Type: application/json' -d '{"text": "Once upon a time"}'

The engine runs in a process of its own (serving/engine_process.py). This one speaks HTTP. It opens its port when the model is
loaded; Ctrl-C stops new requests and lets those that run end, for at most --drain-seconds. docs/server.md says the rest.

Exit code 2 and one line for a mistake of the user's.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from engine_args import add_engine_flags, engine_options
from errors import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a model over HTTP.", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="whom to listen to (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=30000, help="0: one that is free (default: 30000)")
    parser.add_argument("--api-key", help="what clients must send as `Authorization: Bearer KEY`, but for /health")
    parser.add_argument("--served-model-name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--cors-origin", action="append", default=[], help="a web page's origin that may ask")
    parser.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how the model says a tool call (default: as its chat template tells)",
    )
    parser.add_argument(
        "--reasoning-parser", metavar="NAME", help="how it says thoughts (default: gpt-oss if it is one, else off)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, default=1024, help="sequences that may wait (default: 1024)")
    limits.add_argument("--max-body-mb", type=float, default=8.0, help="of a request (default: 8)")
    limits.add_argument("--request-timeout", type=float, default=600.0, help="seconds, waiting included (default: 600)")
    limits.add_argument("--drain-seconds", type=float, default=30.0, help="for those that run at Ctrl-C (default: 30)")
    limits.add_argument(
        "--watchdog-timeout", type=float, default=300.0, help="seconds without a word of a busy engine (default: 300)"
    )
    limits.add_argument("--no-restart", action="store_true", help="do not start another engine when one dies")
    add_engine_flags(parser)
    engine = parser.add_argument_group("engine, as a server has it")
    engine.add_argument("--max-running-requests", type=int, default=16, help="sequences that run (default: 16)")
    engine.add_argument("--max-model-len", type=int, help="longest sequence (default: the model's, if it fits)")
    engine.add_argument("--schedule-policy", default="lpm", choices=["lpm", "dfs-weight", "fcfs", "priority"])
    engine.add_argument("--radix-eviction-policy", default="lru", choices=["lru", "lfu", "fifo"])
    args = parser.parse_args(argv)
    for flag in ("max_queue", "max_body_mb", "request_timeout", "drain_seconds", "watchdog_timeout"):
        if not getattr(args, flag) >= 0:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must not be negative")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port is {args.port}; it must be from 0 to 65535")
    if args.api_key == "":
        parser.error("--api-key is empty; leave it out, or give one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        asyncio.run(serve(args))
    except UserError as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


async def serve(args: argparse.Namespace) -> None:
    """Load the model, then serve until stopped. UserError if the engine refuses the model or an option."""
    import uvicorn

    from serving.app import make_app
    from serving.client import EngineClient
    from serving.settings import Settings
    from tokenizer import Tokenizer

    options = engine_options(args) | dict(
        max_batch_size=args.max_running_requests,
        max_model_len=args.max_model_len,
        schedule_policy=args.schedule_policy,
        radix_eviction_policy=args.radix_eviction_policy,
    )
    client = EngineClient(
        options,
        args.compile,
        restart=not args.no_restart,
        max_queue=args.max_queue,
        request_timeout=args.request_timeout,
        watchdog=args.watchdog_timeout,
    )
    await client.start()
    settings = Settings(
        served_model_name=args.served_model_name or Path(args.model).resolve().name,
        api_key=args.api_key,
        max_body_bytes=int(args.max_body_mb * 2**20),
        request_timeout=args.request_timeout,
        cors_origins=tuple(args.cors_origin),
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
    )
    try:
        app = make_app(client, Tokenizer.from_pretrained(client.model.checkpoint), settings)
        config = uvicorn.Config(
            app,
            host=args.host,
            port=args.port,
            access_log=False,
            timeout_graceful_shutdown=int(args.drain_seconds),
        )
        server = uvicorn.Server(config)
        app.state.stopping = lambda: server.should_exit  # who looks at the page does not hold up Ctrl-C
        await server.serve()
    finally:
        await client.close()


if __name__ == "__main__":
    sys.exit(main())
