"""What Multi-head Latent Attention saves: bytes in the cache, and the time of a decode beside `transformers`.

    python -m bench.mla
    python -m bench.mla --dtype bfloat16 --batch 32 --context 1024

Two parts. The first builds DeepSeek-V3 with its real dimensions and two layers (on the meta device, which takes no memory) and
counts what its cache keeps of a token. The second decodes one token of each sequence through the attention layers of
DeepSeek-V2-Lite (16 heads), projections included, on the CPU, in float32 and then in bfloat16, weights and cache:

    absorbed        as Folio decodes: all heads attend to the latents as they lie in the pages
    expanded        the other form of the same layers: each head's keys and values are made, a piece of the history at a time
    transformers    DeepseekV2Attention with its own cache, SDPA

All three have the same weights and histories, and are first shown to give the same numbers. There are two floors: the bytes of
cache and weights over the bandwidth of reading, and the operations over the rate of a large product of that type. Tables, then one
JSON line.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.ceilings import ceiling, matmul_rate, read_by_product, read_by_sum
from bench.common import alternate, emit, machine_facts, progress, seconds, significant, summarize, table, use_threads
from checkpoint import Checkpoint, load
from families import model_config
from kernels import dispatch
from kernels.reference import history_slots
from model import ModelConfig, Transformer

V3: dict[str, Any] = dict(  # DeepSeek-V3, as its config.json has it, but for the number of layers
    model_type="deepseek_v3",
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=2,
    num_attention_heads=128,
    num_key_value_heads=128,
    vocab_size=129280,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    first_k_dense_replace=3,
    max_position_embeddings=163840,
)
V3_LAYERS = 61
MEMORY = 24 << 30
V2_LITE: dict[str, Any] = (
    dict(  # the attention of DeepSeek-V2-Lite; the rest, which is not measured, is next to nothing
        model_type="deepseek_v2",
        hidden_size=2048,
        intermediate_size=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts_per_tok=6,
        max_position_embeddings=163840,
        eos_token_id=None,
        bos_token_id=None,
    )
)
PAGE = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest number
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- bytes


def cache_size() -> dict[str, int]:
    """Of a token in bfloat16, from what is allocated for it."""
    with torch.device("meta"):
        config = Transformer(model_config(V3)).config
    layers = config.cache.allocate(PAGE, torch.bfloat16, torch.device("cpu"))
    per_layer = sum(t.nbytes for t in layers[0]) // PAGE
    s = config.latent
    heads = config.num_heads * (s.head_dim + s.value) * torch.bfloat16.itemsize
    return {
        "latent_bytes": per_layer,
        "heads_bytes": heads,
        "latent_tokens_in_24_gib": MEMORY // (per_layer * V3_LAYERS),
        "heads_tokens_in_24_gib": MEMORY // (heads * V3_LAYERS),
    }


def show_cache_size(size: dict[str, int]) -> str:
    rows = [
        [name, f"{size[f'{kind}_bytes']:,}", f"{size[f'{kind}_tokens_in_24_gib']:,}"]
        for name, kind in (("latent and rotated key", "latent"), ("expanded keys and values", "heads"))
    ]
    return table(["DeepSeek-V3, bfloat16", "bytes a token and layer", f"tokens in 24 GiB, {V3_LAYERS} layers"], rows)


# ---- time


class Decode:
    """One token of each of B sequences, of `context` entries with its own, through the attention of every layer."""

    def __init__(self, batch: int, context: int, layers: int, dtype: torch.dtype):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        self.dtype = dtype
        settings = AutoConfig.for_model(**V2_LITE, num_hidden_layers=layers, first_k_dense_replace=layers)
        self.theirs = AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
        with tempfile.TemporaryDirectory() as folder:
            self.theirs.save_pretrained(folder)
            self.ours = load(Checkpoint.open(folder), dtype, torch.device("cpu"))
        pages = -(-context // PAGE)
        self.page_table = 1 + torch.randperm(batch * pages).view(batch, pages)
        self.positions = torch.full((batch,), context - 1)
        self.kv = self.ours.config.cache.allocate((1 + batch * pages) * PAGE, dtype, torch.device("cpu"))
        for (rows,) in self.kv:
            rows.normal_()
        self.x = torch.randn(batch, settings.hidden_size).to(dtype)
        self._fill_their_cache()

    def _fill_their_cache(self) -> None:
        """The same histories, without the last token's: [B, 1, context - 1, R], and the rotated keys likewise."""
        from transformers import DynamicCache

        self.past, rank = DynamicCache(), self.ours.config.latent.rank
        slots = history_slots(self.page_table, self.positions, PAGE)[:, : self.positions[0]]
        for i, (rows,) in enumerate(self.kv):
            history = rows[slots][:, None]
            self.past.update(history[..., :rank].clone(), history[..., rank:].clone(), i)

    def absorbed(self) -> list[Tensor]:
        """-> what each layer adds to the residual stream [B, hidden]."""
        layout = self.ours.lay_out_decode(self.positions, self.page_table, PAGE)
        step = self.ours.step_context(layout)
        return [block.attn(self.x, kv, step) for block, kv in zip(self.ours.blocks, self.kv, strict=True)]

    def expanded(self) -> list[Tensor]:
        with mock.patch.object(dispatch, "latent_extend", partial(dispatch.latent_extend, form="expanded")):
            return self.absorbed()

    def transformers(self) -> list[Tensor]:
        x, model = self.x[:, None], self.theirs.model
        turn = model.rotary_emb(x, self.positions[:, None])
        out = [
            layer.self_attn(x, past_key_values=self.past, position_embeddings=turn)[0][:, 0] for layer in model.layers
        ]
        for layer in self.past.layers:  # forget the token again; the views keep what `cat` has made
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        return out

    def check(self) -> float:
        """The largest difference from `transformers`, relative to its largest number."""
        theirs, worst = self.transformers(), 0.0
        for form in (self.absorbed, self.expanded):
            for mine, wanted in zip(form(), theirs, strict=True):
                worst = max(worst, float((mine - wanted).abs().max() / wanted.abs().max()))
        if not worst <= TOLERANCE[self.dtype]:
            raise RuntimeError(f"the three differ by {worst:.1e} of the largest number")
        return worst


def floors(config: ModelConfig, attention: nn.Module, batch: int, context: int, dtype: torch.dtype) -> tuple[int, int]:
    """-> bytes that a decode of one layer has to read, and operations that it has to do, absorbed."""
    s, weights = config.latent, sum(p.numel() for p in attention.parameters())
    pairs = batch * context
    size = dtype.itemsize * (pairs * s.row + weights)
    return size, 2 * config.num_heads * (s.row + s.rank) * pairs + 2 * batch * weights


def steady(work: Callable[[], Any]) -> float:
    """Seconds of a call: the median of as many in a row as half a second has room for, or one."""
    times = [seconds(work)]
    while sum(times) < 0.5:
        times.append(seconds(work))
    return statistics.median(times)


@torch.inference_mode()
def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    dtype = DTYPES[name]
    progress(f"decode in {name}: making the model and its histories")
    decode = Decode(args.batch, args.context, args.layers, dtype)
    error = decode.check()
    size, operations = floors(decode.ours.config, decode.ours.blocks[0].attn, args.batch, args.context, dtype)
    progress(f"decode in {name}: ceilings")
    product = read_by_product(args.mebibytes, args.repeats)
    read = {"sum": read_by_sum(args.mebibytes, args.repeats)} | ({"product": product} if product else {})
    rates = {"read": read, "matmul": matmul_rate(dtype, args.size, args.repeats)}
    progress(f"decode in {name}: timing")
    ways: dict[str, Callable[[], Any]] = {
        way: partial(steady, getattr(decode, way)) for way in ("absorbed", "expanded", "transformers")
    }
    times = {way: summarize(values) for way, values in alternate(ways, args.repeats).items()}
    memory = args.layers * size / ceiling(rates, "read")
    compute = args.layers * operations / ceiling(rates, "matmul")
    record = {
        "batch": args.batch,
        "context": args.context,
        "layers": args.layers,
        "error": significant(error, 3),
        "read_bytes_per_s": significant(ceiling(rates, "read")),
        "matmul_per_s": significant(ceiling(rates, "matmul")),
        "memory_floor_s": significant(memory),
        "compute_floor_s": significant(compute),
    }
    record["ways"] = {
        way: {
            "seconds": stat.json(),
            "times_faster_than_transformers": significant(times["transformers"].median / stat.median, 4),
            "of_memory_floor": significant(stat.median / memory, 4),
            "of_both_floors": significant(stat.median / max(memory, compute), 4),
        }
        for way, stat in times.items()
    }
    rows = [
        [way, stat.show(1, 1e3)] + [f"{record['ways'][way][ratio]:.2f}" for ratio in list(record["ways"][way])[1:]]
        for way, stat in times.items()
    ]
    rows += [
        ["floor: memory", f"{memory * 1e3:,.1f}"] + [""] * 3,
        ["floor: products", f"{compute * 1e3:,.1f}"] + [""] * 3,
    ]
    about = f"V2-Lite attention, {name}, {args.layers} layers, batch {args.batch}, context {args.context}"
    print(table([about, "ms a step", "x transformers", "/ memory floor", "/ higher floor"], rows) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what MLA saves: bytes of cache, and time of a decode.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096, help="entries of each sequence")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, help="default: one after the other")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=512, help="of the array that the bandwidth is measured with")
    parser.add_argument("--size", type=int, default=2048, help="of the square product that the rate is measured with")
    parser.add_argument("--threads", type=int, help="default: what torch takes by itself")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args(argv)
    use_threads(args.threads)
    facts, size = machine_facts(), cache_size()
    print(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}\n")
    print(show_cache_size(size) + "\n")
    record = {name: measure(args, name) for name in ([args.dtype] if args.dtype else DTYPES)}
    emit({"bench": "mla", **facts, "cache": size, "decode": record}, args.out)


if __name__ == "__main__":
    main()
