"""What packing a weight is worth: `F.linear` beside the packed linear of `kernels/linear.py`.

    python -m bench.linear
    python -m bench.linear --rows 1 16 --dtypes float32

The shapes are those of SmolLM2-135M. A model reads every weight once a step, so no weight is in a cache when its turn
comes; here each product takes the next of many copies, together far larger than the caches. The two methods alternate;
the figure is the median of the repeats. Before it is timed, each shape is checked: both methods give the same numbers.
A table, then one JSON line.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import (
    Stat,
    alternate,
    emit,
    machine_facts,
    progress,
    seconds,
    significant,
    summarize,
    table,
    use_threads,
)
from kernels.linear import can_pack, pack, packed_linear

SHAPES = {  # name: (K, N), the weight is [N, K]
    "qkv": (576, 960),
    "out": (576, 576),
    "gate_up": (576, 2 * 1536),
    "down": (1536, 576),
    "head": (576, 49152),
}
ROWS = (1, 2, 4, 16, 128, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative to the largest output


def make_weights(K: int, N: int, dtype: torch.dtype, mebibytes: int) -> list[Tensor]:
    """Copies of one weight [N, K], at least two, that together fill `mebibytes`."""
    weight = torch.randn(N, K).mul_(K**-0.5).to(dtype)
    copies = max(2, -(-(mebibytes << 20) // (weight.numel() * weight.element_size())))
    return [weight.clone() for _ in range(copies)]


def per_call(product: Callable[[Tensor], Tensor], weights: list[Tensor], budget: float) -> Callable[[], float]:
    """-> a measure: seconds of one product, from about `budget` seconds of products over the next copies in turn."""
    turn: Iterator[Tensor] = itertools.cycle(weights)
    product(next(turn))
    once = seconds(lambda: product(next(turn)))
    calls = max(1, min(4 * len(weights), int(budget / once)))

    def work() -> None:
        for weight in itertools.islice(turn, calls):
            product(weight)

    return lambda: seconds(work) / calls


def check(x: Tensor, plain: Tensor, packed: Tensor, tolerance: float) -> None:
    wanted, got = F.linear(x, plain).float(), packed_linear(x, packed).float()
    error = float((wanted - got).abs().max() / wanted.abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"packed linear is off by {error:.1e} of the largest output at {list(x.shape)}")


@torch.inference_mode()
def measure_shape(
    K: int, N: int, rows: list[int], dtype_name: str, repeats: int, mebibytes: int, budget: float
) -> dict[int, dict[str, Stat]]:
    """-> for each M: seconds of [M, K] x [K, N] by method. The plain weights serve as packed ones' source, then stay."""
    dtype = DTYPES[dtype_name]
    plain = make_weights(K, N, dtype, mebibytes)
    packed = [pack(weight) for weight in plain]
    results = {}
    for M in rows:
        x = torch.randn(M, K).to(dtype)
        check(x, plain[0], packed[0], TOLERANCE[dtype_name])
        measures = {
            "F.linear": per_call(lambda w, x=x: F.linear(x, w), plain, budget),
            "packed": per_call(lambda w, x=x: packed_linear(x, w), packed, budget),
        }
        samples = alternate(measures, repeats)
        results[M] = {name: summarize(values) for name, values in samples.items()}
    return results


def row_of(dtype: str, name: str, M: int, result: dict[str, Stat]) -> tuple[list[str], dict[str, Any]]:
    """One result as a line of the table and as JSON."""
    K, N = SHAPES[name]
    size = K * N * DTYPES[dtype].itemsize
    plain, packed = result["F.linear"], result["packed"]
    ratio = plain.median / packed.median
    cells = [f"{name} {K}->{N}", dtype, str(M), plain.show(1, 1e6), packed.show(1, 1e6), f"{ratio:.2f}"]
    cells += [f"{size / packed.median / 1e9:.1f}", f"{2 * M * K * N / packed.median / 1e9:.0f}"]
    record = {"shape": name, "K": K, "N": N, "M": M, "dtype": dtype, "ratio": significant(ratio, 4)}
    return cells, record | {"plain_s": plain.json(), "packed_s": packed.json()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time F.linear and the packed linear on weights that stream from memory."
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="M")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--mebibytes", type=int, default=256, help="of the copies of a weight, far more than the caches"
    )
    parser.add_argument("--budget", type=float, default=0.1, help="seconds of products behind each measurement")
    parser.add_argument("--threads", type=int, help="default: what torch takes by itself")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args()
    use_threads(args.threads)
    torch.manual_seed(0)
    lines, records = [], []
    for dtype, name in itertools.product(args.dtypes, args.shapes):
        if not can_pack(torch.empty(1, 1, dtype=DTYPES[dtype])):
            progress(f"{dtype} {name}: this CPU packs no {dtype}; left out")
            continue
        progress(f"{dtype} {name}")
        results = measure_shape(*SHAPES[name], args.rows, dtype, args.repeats, args.mebibytes, args.budget)
        for M, result in results.items():
            cells, record = row_of(dtype, name, M, result)
            lines.append(cells)
            records.append(record)
    facts = machine_facts()
    print(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}\n")
    print(table(["shape", "dtype", "M", "F.linear us", "packed us", "times faster", "GB/s", "GFLOP/s"], lines))
    emit({"bench": "linear", **facts, "results": records}, args.out)


if __name__ == "__main__":
    main()
