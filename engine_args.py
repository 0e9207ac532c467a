"""The engine's options on a command line: generate.py and server.py have the same ones.

add_engine_flags(parser)
engine = Engine.from_pretrained(**engine_options(parser.parse_args()))
"""

import argparse
from pathlib import Path
from typing import Any

BUNDLED_MODEL = Path(__file__).parent / "assets" / "folio-tiny"


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--model", default=str(BUNDLED_MODEL), help="checkpoint folder or hub id (default: the bundled one)"
    )
    engine.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    engine.add_argument("--device", default="auto", help="auto, cpu or cuda")
    engine.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "max-autotune"],
        help="torch.compile the step first: seconds now, speed after (max-autotune: minutes, and maybe some more)",
    )
    engine.add_argument("--no-graphs", action="store_true", help="on a GPU: launch every kernel, no CUDA graphs")
    engine.add_argument(
        "--attention",
        default="auto",
        choices=["auto", "reference", "sdpa", "triton"],
        help="attention kernels (default: triton on a GPU, sdpa elsewhere)",
    )
    engine.add_argument("--grammar-backend", default="auto", choices=["auto", "xgrammar", "llguidance"])
    engine.add_argument("--no-jump-forward", action="store_true", help="a step for each token, also for forced ones")
    cache = parser.add_argument_group("cache and scheduler")
    cache.add_argument("--max-total-tokens", type=int, default=None, help="tokens in the cache (default: what fits)")
    cache.add_argument("--page-size", type=int, default=16, help="tokens in a page, 1 to 128 (default: 16)")
    cache.add_argument(
        "--chunked-prefill-size", type=int, default=2048, help="most prompt tokens in one step (default: 2048)"
    )
    cache.add_argument("--no-chunked-prefill", action="store_true", help="compute a prompt whole, whatever its length")
    cache.add_argument("--no-radix", action="store_true", help="do not keep prefixes for later prompts")
    cache.add_argument("--no-overlap", action="store_true", help="plan a step only when the one before is done")
    cache.add_argument("--trace", metavar="FILE", help="write a timeline of the steps for ui.perfetto.dev")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `Engine.from_pretrained`, `model` among them. `--compile` is not one: it is done after."""
    return dict(
        model=args.model,
        dtype=args.dtype,
        device=args.device,
        max_total_tokens=args.max_total_tokens,
        page_size=args.page_size,
        chunk_size=args.chunked_prefill_size,
        chunked_prefill=not args.no_chunked_prefill,
        radix=not args.no_radix,
        overlap=not args.no_overlap,
        graphs=False if args.no_graphs else None,
        attention=args.attention,
        grammar_backend=args.grammar_backend,
        jump_forward=not args.no_jump_forward,
        trace=args.trace,
    )
