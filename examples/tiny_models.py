"""The two models that train_tiny trains: a Llama, and a small DeepSeek-V3.

    python -m examples.train_tiny --architecture mla --out out/folio-tiny-mla

Both are `transformers` classes on purpose: Folio's own model.py has to give the same tokens as an implementation that
we did not write. The second has every part of the large one: latent attention with a latent for the queries too, a
dense first layer, then experts that a sigmoid router picks by groups, beside a shared one.

Nothing in the loss asks for balanced experts. `Balance` moves the router's correction bias after each step, as in
DeepSeek-V3 ("auxiliary-loss-free load balancing", Wang et al., 2024): the bias only counts when experts are chosen, so
it evens the load and the gradient never hears of it.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

CONTEXT = 2048
INIT = 0.05  # the usual 0.02 is meant for wider models; attention starts flatter than it need be in one of width 192
BALANCE_RATE = 0.005  # DeepSeek-V3 takes 0.001 over far more steps

_COMMON = dict(
    hidden_size=192,
    intermediate_size=512,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    initializer_range=INIT,
    tie_word_embeddings=True,
    bos_token_id=None,
)


def llama(**tokens: int) -> LlamaForCausalLM:
    """2.56 M weights; `tokens` are the settings that the tokenizer decides, vocab_size among them."""
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=32, rope_theta=10000.0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **heads, **_COMMON, **tokens))


def mla(**tokens: int) -> DeepseekV3ForCausalLM:
    """3.92 M weights, of which a token uses 2.15 M: 2 of 8 experts and the shared one."""
    config = DeepseekV3Config(
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=96,
        kv_lora_rank=96,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        rope_theta=100.0,  # frequencies from 1 to 1/75; with 10,000 most of the 16 hardly turn within a sentence
        v_head_dim=64,  # = 32 + 32: with unequal widths PyTorch's attention on a CPU falls back to whole score matrices
        first_k_dense_replace=1,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,  # times the number of experts a token has: each weighs about 1, as the shared one
        num_nextn_predict_layers=0,
        **_COMMON,
        **tokens,
    )
    ALL_EXPERTS_FUNCTIONS["grouped_autocast"] = grouped_experts
    config._experts_implementation = "grouped_autocast"
    AttentionInterface.register("whole_scores", whole_scores)
    config._attn_implementation = "whole_scores"
    model = DeepseekV3ForCausalLM(config)
    widen_attention(model)
    return model


def grouped_experts(experts: nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`x` [T, hidden] through the experts `chosen` [T, k], weighed by `weights` [T, k] -> [T, hidden].

    Tokens sorted by expert and grouped products, as transformers' own "grouped_mm", but in autocast's type, of which
    grouped products know nothing: on a CPU with bf16 a training step takes half the time.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    order = chosen.flatten().argsort(stable=True)
    ends = chosen.flatten().bincount(minlength=experts.num_experts).cumsum(0).int()
    both = F.grouped_mm(x.to(dtype)[order // chosen.shape[1]], experts.gate_up_proj.to(dtype).mT, offs=ends)
    gate, up = both.chunk(2, dim=-1)  # [T * k, width] each
    down = F.grouped_mm(F.silu(gate) * up, experts.down_proj.to(dtype).mT, offs=ends)
    return (down[order.argsort()].view(*chosen.shape, -1) * weights[..., None].to(dtype)).sum(1)


def whole_scores(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, scaling: float, **kwargs
) -> tuple[torch.Tensor, None]:
    """Causal attention of q, k [B, H, T, D] to v [B, H, T, D] -> ([B, T, H, D], None).

    Short rows by two products around a softmax: on a CPU the backward pass of PyTorch's fused attention takes twice as
    long. Long rows by that, for their scores leave the cache of the processor.
    """
    B, H, T, _ = q.shape
    if T > 512:
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    future = torch.full((T, T), -torch.inf, dtype=v.dtype).triu(1)
    scores = torch.baddbmm(future.expand(B * H, T, T), q.to(v.dtype), k.to(v.dtype).mT, alpha=scaling)
    return (scores.softmax(-1) @ v).view(B, H, T, -1).transpose(1, 2), None


def widen_attention(model: DeepseekV3ForCausalLM) -> None:
    """A start from which heads find the tokens just before: without it the first layer had none after 1,700 steps, and
    nothing that copies a name can come after them.

    What reads a latent starts larger, for a latent is narrower than the stream, and queries twice as large again. All
    embeddings share one random direction, so that from the first layer on a query can be the same whatever the token,
    and attend by distance alone; there are no biases to do that. The tied head does not notice: it is the same logit more
    for every token.
    """
    config = model.config
    for name, weight in model.named_parameters():
        if name.endswith(("q_b_proj.weight", "kv_b_proj.weight")):
            gain = 2.0 if "q_b" in name else 1.0
            torch.nn.init.normal_(weight, std=gain * INIT * math.sqrt(config.hidden_size / weight.shape[1]))
    with torch.no_grad():
        model.model.embed_tokens.weight += torch.randn(config.hidden_size) * INIT


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "mla": mla}


def build(architecture: str, **tokens: int) -> PreTrainedModel:
    """A fresh model, drawn from PyTorch's global generator."""
    model = ARCHITECTURES[architecture](**tokens)
    for name, weight in model.named_parameters():  # as in GPT-2: what writes to the residual stream starts smaller
        if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
            torch.nn.init.normal_(weight, std=INIT / math.sqrt(2 * model.config.num_hidden_layers))
    return model


class Balance:
    """Watches the routers of a model (none in a Llama) and, after each step, makes busy experts a little less likely."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        self.load = {router: torch.zeros(router.num_experts) for router in self.routers}  # tokens of each expert
        for router in self.routers:
            router.register_forward_hook(self._count)

    def _count(self, router: DeepseekV3TopkRouter, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        _, _, chosen = output  # logits, weights, [T, experts a token]
        self.load[router] += torch.bincount(chosen.flatten(), minlength=router.num_experts)

    def step(self, rate: float) -> float:
        """bias += rate * sign(mean load - load). -> the load of the busiest expert / the mean, the worst layer's."""
        worst = 1.0
        for router, load in self.load.items():
            router.e_score_correction_bias += rate * torch.sign(load.mean() - load)
            worst = max(worst, float(load.max() / load.mean()))
            load.zero_()
        return worst
