"""Mixture of experts: which experts a token is sent to, and the layer that stands where a dense model has its MLP.

A router scores E experts for each token, the best k run, and what they say is added up by weight (Shazeer et al., 2017).
Families agree on that and on little else: what the scores are, what of them chooses, what of them weighs. Each way is a small
function below, with the paper that it comes from; `MoESpec` says which, and with what numbers. The scores are computed in float32
whatever the model is in, since a rounded one may choose another expert. The experts themselves are run by `kernels/dispatch.py`.

    python -m pytest tests/test_moe.py

Shapes: T tokens, E experts, k of them a token, G groups, I intermediate size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import UserError
from kernels import linear
from kernels.dispatch import run_experts
from kernels.linear import can_pack, pack, plain_linear, unpack
from layers import MLP, Linear


@dataclass(frozen=True)
class MoESpec:
    """What shapes the experts of a model and the choice between them. UserError for what contradicts itself; it has the
    names that config.json uses."""

    num_experts: int
    top_k: int
    intermediate_size: int  # of an expert
    layers: tuple[bool, ...]  # of each layer: has it experts, or is it dense?

    # routing
    routing: str = "softmax"  # of ROUTINGS
    renormalize: bool = False  # the k weights are made to add up to 1
    scale: float = 1.0  # then multiplied by this
    groups: int = 1  # experts are chosen from the best `topk_groups` groups only
    topk_groups: int = 1
    group_score: str = "max"  # of GROUP_SCORES
    router_bias: bool = False
    correction_bias: bool = False  # added to the scores that choose, and not to those that weigh

    # experts
    bias: bool = False
    clamp: tuple[float, float] | None = None  # (alpha, limit) of gpt-oss's gate, see `kernels/activations.py`
    weigh_input: bool = False  # the weights multiply what goes into the experts (Llama 4)
    shared_size: int = 0  # intermediate size of the experts that every token goes through, all as one MLP; 0: none
    shared_gate: bool = False  # times sigmoid of a score of its own (Qwen2-MoE)

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise UserError(f"routing {self.routing!r} is not supported; these are: {', '.join(ROUTINGS)}")
        if self.group_score not in GROUP_SCORES:
            raise UserError(f"group score {self.group_score!r} is not supported; these are: {', '.join(GROUP_SCORES)}")
        if not 1 <= (self.top_k or 0) <= self.num_experts:
            raise UserError(
                f"num_experts_per_tok is {self.top_k}: must be from 1 to the {self.num_experts} experts there are"
            )
        if self.groups < 1 or self.num_experts % self.groups:
            raise UserError(f"n_group is {self.groups}: it must divide the {self.num_experts} experts")
        if not 1 <= self.topk_groups <= self.groups:
            raise UserError(f"topk_group is {self.topk_groups}: must be from 1 to n_group, which is {self.groups}")
        available = self.num_experts // self.groups * self.topk_groups
        if self.top_k > available:
            raise UserError(
                f"num_experts_per_tok is {self.top_k}, and the topk_group best groups have {available} experts"
            )
        if self.group_score == "top2" and self.groups > 1 and self.num_experts // self.groups < 2:
            raise UserError(f"n_group is {self.groups}: groups that are scored by their two best need two experts each")


# ---- routing: logits [T, E] float32, correction_bias [E] or None -> chosen [T, k], weights [T, k] float32


def softmax_top_k(logits: Tensor, spec: MoESpec, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the k best (GShard, Lepikhin et al., 2020; Mixtral, Jiang et al., 2024, renormalises).

    With groups: DeepSeek-V2 (2024), group-limited greedy.
    """
    return weigh_best(logits.softmax(-1), spec, correction_bias)


def top_k_softmax(logits: Tensor, spec: MoESpec, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best, then softmax over those alone (Shazeer et al., 2017; Granite 3, gpt-oss)."""
    chosen = best(logits, spec, correction_bias)
    return chosen, logits.gather(-1, chosen).softmax(-1) * spec.scale


def top_k_sigmoid(logits: Tensor, spec: MoESpec, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best, each with a weight of its own (Llama 4, 2025)."""
    chosen = best(logits, spec, correction_bias)
    return chosen, logits.gather(-1, chosen).sigmoid() * spec.scale


def sigmoid_top_k(logits: Tensor, spec: MoESpec, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every expert scored by itself, the best chosen after a correction that is learnt so that all get their share of the
    tokens (DeepSeek-V3, 2024; Wang et al., 2024). With groups: by the sum of their best two."""
    return weigh_best(logits.sigmoid(), spec, correction_bias)


Routing = Callable[[Tensor, MoESpec, Tensor | None], tuple[Tensor, Tensor]]
ROUTINGS: dict[str, Routing] = {
    "softmax": softmax_top_k,
    "top_k_softmax": top_k_softmax,
    "sigmoid": sigmoid_top_k,
    "top_k_sigmoid": top_k_sigmoid,
}

# What a group is worth, by the scores of its experts [..., E / G]: its best (DeepSeek-V2), its best two (V3).
GROUP_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda scores: scores.amax(-1),
    "top2": lambda scores: scores.topk(2, -1)[0].sum(-1),
}


def weigh_best(scores: Tensor, spec: MoESpec, correction_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """scores [T, E] -> the k best experts, and their scores as weights [T, k]."""
    chosen = best(scores, spec, correction_bias)
    weights = scores.gather(-1, chosen)
    if spec.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * spec.scale


def best(scores: Tensor, spec: MoESpec, correction_bias: Tensor | None) -> Tensor:
    """scores [T, E] -> the k best experts [T, k] after correction, out of the best groups."""
    if correction_bias is not None:
        scores = scores + correction_bias
    if spec.groups > 1:
        scores = scores.masked_fill(~in_best_groups(scores, spec), float("-inf"))
    return scores.topk(spec.top_k, -1)[1]


def in_best_groups(scores: Tensor, spec: MoESpec) -> Tensor:
    """scores [T, E] -> bool [T, E]. Experts of a group live on one machine, and few groups mean little traffic."""
    worth = GROUP_SCORES[spec.group_score](scores.unflatten(-1, (spec.groups, -1)))  # [T, G]
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(spec.topk_groups, -1)[1], True)
    return kept.repeat_interleave(spec.num_experts // spec.groups, -1)


# ---- the layer


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Router(nn.Module):
    """Scores the experts and chooses. Its weights stay in float32; they are few, and never packed."""

    def __init__(self, hidden_size: int, spec: MoESpec):
        super().__init__()
        self.spec = spec
        self.weight = _parameter(spec.num_experts, hidden_size)
        self.bias = _parameter(spec.num_experts) if spec.router_bias else None
        self.correction_bias = _parameter(spec.num_experts) if spec.correction_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> chosen [T, k], weights [T, k] float32."""
        bias = None if self.bias is None else self.bias.float()
        logits = plain_linear(x.float(), self.weight.float(), bias)
        return ROUTINGS[self.spec.routing](logits, self.spec, self.correction_bias)


class Experts(nn.Module):
    """The weights of all experts of a layer, stacked; `pack()` re-lays them for the CPU, expert by expert, into lists.

    Small ones stay as they are: many calls with few rows each are what oneDNN is slow to start.
    """

    def __init__(self, hidden_size: int, spec: MoESpec, activation: str):
        super().__init__()
        E, size = spec.num_experts, spec.intermediate_size
        self.gate_up, self.down = _parameter(E, 2 * size, hidden_size), _parameter(E, hidden_size, size)
        self.gate_up_bias = _parameter(E, 2 * size) if spec.bias else None
        self.down_bias = _parameter(E, hidden_size) if spec.bias else None
        self.activation, self.clamp, self.weigh_input = activation, spec.clamp or (), spec.weigh_input
        self.share = spec.top_k / E  # of the weights, that one token reads
        self.packed: dict[str, list[Tensor]] = {}

    def pack(self) -> None:
        for name in ("gate_up", "down"):
            weight = getattr(self, name)
            if name not in self.packed and can_pack(weight) and weight[0].numel() >= linear.WORTH_A_CALL:
                self.packed[name] = [pack(w) for w in weight.data]
                setattr(self, name, None)

    def unpack(self) -> None:
        for name in list(self.packed):
            setattr(self, name, nn.Parameter(self.plain(name), requires_grad=False))
            del self.packed[name]

    def plain(self, name: str) -> Tensor:
        """The stacked weight, packed or not."""
        return torch.stack([unpack(w) for w in self.packed[name]]) if name in self.packed else getattr(self, name).data

    def bytes_per_token(self) -> int:
        """Bytes of weights that one token reads."""
        tensors = [w for packed in self.packed.values() for w in packed] + list(self.parameters())
        return round(self.share * sum(w.numel() * w.element_size() for w in tensors))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = (self.packed.get(name, getattr(self, name)) for name in ("gate_up", "down"))
        biases = (self.gate_up_bias, self.down_bias)
        return run_experts(x, chosen, weights, gate_up, down, *biases, self.activation, self.clamp, self.weigh_input)


class MoE(nn.Module):
    """x [T, hidden] -> [T, hidden]: the chosen experts, and those that all tokens share."""

    def __init__(self, hidden_size: int, spec: MoESpec, activation: str):
        super().__init__()
        self.router = Router(hidden_size, spec)
        self.experts = Experts(hidden_size, spec, activation)
        self.shared = MLP(hidden_size, spec.shared_size, False, activation) if spec.shared_size else None
        self.shared_gate = Linear(hidden_size, 1, False) if spec.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts(x, *self.router(x))
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
