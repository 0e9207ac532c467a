"""How fast this machine can possibly go: the denominators of every other figure.

    python -m bench.ceilings
    python -m bench.ceilings --threads 1 --mebibytes 1024

    read        bytes read per second, by a sum over an array
    read (mv)   the same by a product of one row with a packed matrix, which is what decoding does
    copy        bytes read plus bytes written per second
    matmul      multiply-adds of a large square product, two operations each; by `torch.matmul` (BLAS or oneDNN) and by
                the packed linear of `kernels/linear.py`, which prefill uses

The larger of two methods is the ceiling: a floor of time that any method beats is no floor. A table, then one JSON line.
"""

import argparse
from typing import Any

import torch

from bench.common import Stat, emit, machine_facts, progress, seconds, significant, summarize, table, use_threads
from kernels.linear import can_pack, pack, packed_linear
from machine import read_bandwidth

CPU = torch.device("cpu")
COLUMNS = 4096  # of the matrix of the matrix-vector product


def read_by_sum(mebibytes: int, repeats: int) -> Stat:
    """Bytes per second; `repeats` runs of machine.read_bandwidth, each a median already."""
    return summarize(read_bandwidth(CPU, mebibytes) for _ in range(repeats))


@torch.inference_mode()
def read_by_product(mebibytes: int, repeats: int) -> Stat | None:
    """Bytes of weight per second in [1, K] x [K, N] with a packed float32 weight. None where nothing can be packed."""
    plain = torch.ones(max(1, (mebibytes << 20) // (4 * COLUMNS)), COLUMNS)
    if not can_pack(plain):
        return None
    size, weight, x = plain.numel() * 4, pack(plain), torch.ones(1, COLUMNS)
    del plain
    times = [seconds(lambda: packed_linear(x, weight)) for _ in range(repeats + 1)]
    return summarize(size / t for t in times[1:])


@torch.inference_mode()
def copy_bandwidth(mebibytes: int, repeats: int) -> Stat:
    """Bytes read plus bytes written per second."""
    source = torch.ones(mebibytes << 18)
    target = torch.zeros_like(source)
    times = [seconds(lambda: target.copy_(source)) for _ in range(repeats + 1)]
    return summarize(2 * 4 * source.numel() / t for t in times[1:])


@torch.inference_mode()
def matmul_rate(dtype: torch.dtype, size: int, repeats: int) -> dict[str, Stat]:
    """Operations per second of a [size, size] product, by method."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    methods = {"matmul": lambda: a @ b}
    if can_pack(b):
        packed = pack(b)
        methods["packed"] = lambda: packed_linear(a, packed)
    rates = {}
    for name, work in methods.items():
        times = [seconds(work) for _ in range(repeats + 1)]
        rates[name] = summarize(2 * size**3 / t for t in times[1:])
    return rates


def measure(mebibytes: int = 512, size: int = 2048, repeats: int = 5) -> dict[str, dict[str, Stat]]:
    """-> {"read": {method: Stat}, "copy": ..., "float32": ..., "bfloat16": ...}; bytes or operations per second."""
    progress("ceilings: memory")
    product = read_by_product(mebibytes, repeats)
    ceilings = {
        "read": {"sum": read_by_sum(mebibytes, repeats)} | ({"product": product} if product else {}),
        "copy": {"copy": copy_bandwidth(mebibytes // 2, repeats)},
    }
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        progress(f"ceilings: {name} products")
        ceilings[name] = matmul_rate(dtype, size, repeats)
    return ceilings


def ceiling(ceilings: dict[str, dict[str, Stat]], name: str) -> float:
    """The largest median of the methods."""
    return max(stat.median for stat in ceilings[name].values())


def show(ceilings: dict[str, dict[str, Stat]]) -> str:
    facts = machine_facts()
    rows = [
        [f"{name} ({method})", f"{stat.show(1, 1e-9)} {'GB/s' if name in ('read', 'copy') else 'GFLOP/s'}"]
        for name, methods in ceilings.items()
        for method, stat in methods.items()
    ]
    about = f"{facts['cpu']}, {facts['threads']} threads, last-level cache {facts['last_level_cache'] or 'unknown'}"
    return f"{about}, torch {facts['torch']}\n\n" + table(["ceiling", "median (min..max)"], rows)


def as_json(ceilings: dict[str, dict[str, Stat]]) -> dict[str, Any]:
    return {
        name: {"ceiling": significant(ceiling(ceilings, name))} | {m: stat.json() for m, stat in methods.items()}
        for name, methods in ceilings.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure memory bandwidth and matmul rate of this machine's CPU.")
    parser.add_argument("--threads", type=int, help="default: what torch takes by itself")
    parser.add_argument("--mebibytes", type=int, default=512, help="of the arrays; far more than the caches hold")
    parser.add_argument("--size", type=int, default=2048, help="of the square products")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args()
    use_threads(args.threads)
    ceilings = measure(args.mebibytes, args.size, args.repeats)
    print(show(ceilings))
    emit({"bench": "ceilings", **machine_facts(), "ceilings": as_json(ceilings)}, args.out)


if __name__ == "__main__":
    main()
