"""Peak memory while a checkpoint is loaded, as a multiple of its size.

    python -m bench.load                     # 2 GB, float32 on disk and in memory
    python -m bench.load --tied --dtype bfloat16 --gigabytes 1

A Llama-shaped checkpoint of random weights is written once to the system's temporary folder. It is loaded in a process of
its own, whose peak resident memory is read at the end; what the same process needs for a checkpoint of next to nothing (torch,
the libraries) is subtracted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

LOAD = """
import sys, torch
from checkpoint import Checkpoint, load
from machine import peak_memory
model = load(Checkpoint.open(sys.argv[1]), getattr(torch, sys.argv[2]), torch.device("cpu"))
print(peak_memory(torch.device("cpu")))
"""
LAYER_WEIGHTS = 4 * 2048 * 2048 + 3 * 2048 * 8192  # of a Llama layer: hidden 2048, no GQA, intermediate 8192
VOCAB = 32000


def checkpoint(layers: int, vocab: int, tied: bool, dtype: str) -> Path:
    """The folder of a random checkpoint, written if it is not there yet."""
    folder = Path(tempfile.gettempdir()) / "folio-bench" / f"load-{layers}-{vocab}-{tied}-{dtype}"
    if not (folder / "model.safetensors").exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=layers,
            num_attention_heads=32,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        )
        torch.set_default_dtype(getattr(torch, dtype))
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="50GB")
        torch.set_default_dtype(torch.float32)
    return folder


def peak(folder: Path, dtype: str) -> int:
    """Bytes: the peak resident memory of a process that loads the folder."""
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), dtype], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory while loading, as a multiple of the checkpoint.")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="on disk and in memory")
    parser.add_argument("--tied", action="store_true", help="one matrix for embedding and head")
    args = parser.parse_args()
    bytes_per_weight = getattr(torch, args.dtype).itemsize
    ends = VOCAB * 2048 * (1 if args.tied else 2)
    layers = round((args.gigabytes * 1e9 / bytes_per_weight - ends) / LAYER_WEIGHTS)
    folder = checkpoint(max(1, layers), VOCAB, args.tied, args.dtype)
    size = (folder / "model.safetensors").stat().st_size
    base = peak(checkpoint(1, 64, args.tied, args.dtype), args.dtype) - LAYER_WEIGHTS * bytes_per_weight
    used = peak(folder, args.dtype) - base
    print(
        f"checkpoint {size / 1e9:.2f} GB, peak while loading {used / 1e9:.2f} GB above a bare process: {used / size:.2f}x"
    )
    print(json.dumps({"bench": "load", "dtype": args.dtype, "tied": args.tied, "size": size, "peak": used}))


if __name__ == "__main__":
    main()
