"""How long a new user waits: from the command to the first token, and for `--compile`, cold and warm.

    python -m bench.start                # eager start, beside `import torch, transformers`
    python -m bench.start --compile      # and the cold and the warm start of --compile, in a fresh cache folder

Every measurement is a process of its own; the two kinds of start alternate, median of --repeats.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROMPT = "Once upon a time"
GENERATE = [sys.executable, str(ROOT / "generate.py"), "--prompt", PROMPT]


def first_token() -> float:
    """Seconds until generate.py has written more than the prompt."""
    start = time.perf_counter()
    with subprocess.Popen([*GENERATE, "--quiet"], stdout=subprocess.PIPE) as process:
        process.stdout.read(len(PROMPT) + 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def imports() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, transformers"], check=True)
    return time.perf_counter() - start


def compile_seconds(cache: str, *flags: str) -> float:
    """What the figures of generate.py --compile say, with compiled code kept in `cache`."""
    environment = os.environ | {"FOLIO_CACHE_DIR": cache}
    command = [*GENERATE, "--compile", "--quiet", "--json", *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout.splitlines()[-1])["figures"]["compile_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first token, and of --compile.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    first_token(), imports()  # the disk's cache
    pairs = [(first_token(), imports()) for _ in range(args.repeats)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"first token after {ours:.2f} s; `import torch, transformers` takes {theirs:.2f} s: {ours / theirs:.2f}x")
    result = {"bench": "start", "first_token": ours, "imports": theirs, "pairs": pairs}
    if args.compile:
        for kind, flags in {"sampled": (), "greedy": ("--temperature", "0")}.items():
            with tempfile.TemporaryDirectory() as cache:
                cold, warm = compile_seconds(cache, *flags), compile_seconds(cache, *flags)
            print(f"--compile, {kind}: cold {cold:.1f} s, warm {warm:.1f} s")
            result[kind] = {"cold": cold, "warm": warm}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
