"""One mixture-of-experts layer on a CPU: its time beside its floor, and beside that of `transformers`.

    python -m bench.experts
    python -m bench.experts --shapes v2-lite --tokens 1 16 --dtypes bfloat16

The layer is router, routed experts and shared experts, of random weights; both sides have the same. Every call takes
other tokens, which choose other experts, so that no weight is in a cache by intention. The floor is the larger of two
times: to read once the weights of the experts that these tokens hit, at the machine's bandwidth, and to do the products,
at its matmul rate. The sides alternate; the figure is the median of the repeats. Before it is timed, each case is
checked: both give the same numbers. A table, then one JSON line. Takes 8 GB of memory in float32.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.ceilings import ceiling, measure
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
from kernels.experts import tokens_per_expert
from layers import Linear
from moe import Experts, MoE, MoESpec

SHAPES: dict[str, dict[str, Any]] = {  # as config.json has them
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe",
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "v2-lite": dict(
        model_type="deepseek_v2",
        hidden_size=2048,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
    ),
    "tiny": dict(
        model_type="qwen3_moe",
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
}
TOKENS = (1, 16, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative to the largest output
INPUTS = 16  # different sets of tokens that the calls take in turn


@dataclass(frozen=True)
class Case:
    """Both layers, with the same weights."""

    ours: MoE
    theirs: Callable[[Tensor], Tensor]
    spec: MoESpec
    hidden: int

    def flops(self, tokens: int) -> int:
        """Of the experts' products, shared ones included."""
        return 6 * tokens * self.hidden * (self.spec.top_k * self.spec.intermediate_size + self.spec.shared_size)

    def size(self, x: Tensor) -> float:
        """Bytes of the weights that these tokens need."""
        counts = tokens_per_expert(self.ours.router(x)[0], self.spec.num_experts)
        hit = int((counts > 0).sum())
        return 3 * self.hidden * (hit * self.spec.intermediate_size + self.spec.shared_size) * x.element_size()


@torch.inference_mode()
def make_case(shape: str, dtype: torch.dtype) -> Case:
    settings = SHAPES[shape]
    hidden, shared = settings["hidden_size"], settings.get("n_shared_experts", 0)
    spec = MoESpec(
        num_experts=settings.get("num_experts") or settings["n_routed_experts"],
        top_k=settings["num_experts_per_tok"],
        intermediate_size=settings["moe_intermediate_size"],
        layers=(True,),
        renormalize=settings.get("norm_topk_prob", False),
        shared_size=shared * settings["moe_intermediate_size"],
    )
    theirs = their_layer(settings, dtype)
    with torch.device("meta"):
        ours = MoE(hidden, spec, "silu")
    ours.router.weight = nn.Parameter(theirs.gate.weight.float(), requires_grad=False)
    ours.experts.gate_up = nn.Parameter(theirs.experts.gate_up_proj.data, requires_grad=False)
    ours.experts.down = nn.Parameter(theirs.experts.down_proj.data, requires_grad=False)
    if shared:
        s = theirs.shared_experts
        both = torch.cat([s.gate_proj.weight, s.up_proj.weight])
        ours.shared.gate_up.weight = nn.Parameter(both, requires_grad=False)
        ours.shared.down.weight = nn.Parameter(s.down_proj.weight.data, requires_grad=False)
    for module in ours.modules():
        if isinstance(module, Linear | Experts):
            module.pack()
    return Case(ours, lambda x: theirs(x[None])[0], spec, hidden)


def their_layer(settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The layer of `transformers`, as its model would make it, whichever way of computing experts that chooses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config.vocab_size, config.pad_token_id = 8, None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    layer = model.model.layers[0].mlp
    for name, parameter in layer.named_parameters():
        parameter.normal_(0, 1.0 if name == "gate.weight" else parameter.shape[-1] ** -0.5)
    return layer


def check(case: Case, x: Tensor, tolerance: float) -> None:
    wanted, got = case.theirs(x).float(), case.ours(x).float()
    error = float((wanted - got).abs().max() / wanted.abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"the layer is off by {error:.1e} of the largest output at {list(x.shape)}")


def per_call(layer: Callable[[Tensor], Tensor], inputs: list[Tensor], budget: float) -> Callable[[], float]:
    """-> a measure: seconds of one call, from about `budget` seconds of calls, each with the next input."""
    turn: Iterator[Tensor] = itertools.cycle(inputs)
    layer(next(turn))
    calls = max(1, int(budget / seconds(lambda: layer(next(turn)))))

    def work() -> None:
        for x in itertools.islice(turn, calls):
            layer(x)

    return lambda: seconds(work) / calls


@torch.inference_mode()
def measure_case(
    case: Case, tokens: int, dtype_name: str, repeats: int, budget: float
) -> tuple[dict[str, Stat], float]:
    """-> seconds of a call by side, and the bytes that a call needs (a mean over the inputs)."""
    dtype = DTYPES[dtype_name]
    inputs = [torch.randn(tokens, case.hidden).to(dtype) for _ in range(INPUTS)]
    check(case, inputs[0], TOLERANCE[dtype_name])
    measures = {"folio": per_call(case.ours, inputs, budget), "transformers": per_call(case.theirs, inputs, budget)}
    stats = {name: summarize(values) for name, values in alternate(measures, repeats).items()}
    return stats, sum(case.size(x) for x in inputs) / INPUTS


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one mixture-of-experts layer on a CPU.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b", "v2-lite"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="T")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of calls behind each measurement")
    parser.add_argument("--mebibytes", type=int, default=512, help="of the arrays that bandwidth is measured with")
    parser.add_argument("--threads", type=int, help="default: what torch takes by itself")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args()
    use_threads(args.threads)
    torch.manual_seed(0)
    ceilings = measure(args.mebibytes)
    lines, records = [], []
    for shape, dtype in itertools.product(args.shapes, args.dtypes):
        progress(f"{shape} in {dtype}")
        case = make_case(shape, DTYPES[dtype])
        for tokens in args.tokens:
            stats, size = measure_case(case, tokens, dtype, args.repeats, args.budget)
            flops = case.flops(tokens)
            floor = max(size / ceiling(ceilings, "read"), flops / ceiling(ceilings, dtype))
            ours, theirs = stats["folio"], stats["transformers"]
            cells = [f"{shape} {dtype}", str(tokens), ours.show(2, 1e3), theirs.show(2, 1e3), f"{floor * 1e3:.2f}"]
            lines.append([*cells, f"{floor / ours.median:.0%}", f"{theirs.median / ours.median:.2f}"])
            record = {"shape": shape, "dtype": dtype, "tokens": tokens, "bytes": round(size), "flops": flops}
            sides = {f"{name}_s": stat.json() for name, stat in stats.items()}
            records.append(record | sides | {"floor_s": significant(floor)})
        del case
    facts = machine_facts()
    print(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}\n")
    headers = ["layer", "tokens", "folio ms", "transformers ms", "floor ms", "of the floor", "times faster"]
    print(table(headers, lines))
    emit({"bench": "experts", **facts, "results": records}, args.out)


if __name__ == "__main__":
    main()
