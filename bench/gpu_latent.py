"""What `bench.gpu` needs for a model with latents and experts: its shape, its attention in three forms, how its experts are loaded.

    from bench.gpu_latent import FORMS, V2_LITE, counted, form_of_attention, step_bytes

The forms of attention of one model, whose cache is the same each time:

    absorbed, Triton    kernels/mla.py: what a GPU takes
    absorbed, torch     kernels/latent.py
    expanded, torch     each head's keys and values are made from the latents in every step, then PyTorch's own attention
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import mla
from kernels import dispatch
from kernels.experts import tokens_per_expert
from kernels.latent import latent_extend
from model import Transformer
from moe import Experts, Router

V2_LITE: dict[str, Any] = mla.V2_LITE | dict(  # DeepSeek-V2-Lite
    intermediate_size=10944,
    num_hidden_layers=27,
    vocab_size=102400,
    first_k_dense_replace=1,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    topk_method="greedy",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    rope_parameters=dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
)
TINY: dict[str, Any] = V2_LITE | dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=1024,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=3,
)
FORMS = {"absorbed, Triton": "triton", "absorbed, torch": "sdpa", "expanded, torch": "sdpa"}  # and the backend of each


@contextmanager
def form_of_attention(form: str) -> Iterator[None]:
    """While it is open, engines that are made, and compile, attend in this form."""
    if form != "expanded, torch":
        yield
        return
    with (
        mock.patch.object(dispatch, "latent_decode", expanded_decode),  # of a compiled step
        mock.patch.object(dispatch, "latent_extend", partial(latent_extend, form="expanded")),
    ):
        yield


def expanded_decode(
    q_nope: Tensor, q_rope: Tensor, kv_up: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """The arguments of `kernels.latent.latent_decode`, and its result, by way of each head's keys and values."""
    (_, H, nope), R = q_nope.shape, kv_up.shape[-1]
    rows = cache.index_select(0, slots.flatten()).view(*slots.shape, -1)  # [B, L, R + rope]
    up = (rows[..., :R] @ kv_up.flatten(0, 1).T).unflatten(-1, (H, -1)).transpose(1, 2)  # [B, H, L, nope + V]
    keys = torch.cat((up[..., :nope], rows[:, None, :, R:].expand(-1, H, -1, -1)), -1)
    sees = torch.arange(slots.shape[1], device=slots.device) <= positions[:, None]
    query = torch.cat((q_nope, q_rope), -1)[:, :, None]
    out = F.scaled_dot_product_attention(query, keys, up[..., nope:], attn_mask=sees[:, None, None], scale=scale)
    return out[:, :, 0]


class Load:
    """How the experts of one layer were loaded, of all steps of so many rows."""

    def __init__(self, experts: int, rows: int):
        self.experts, self.rows, self.steps = experts, rows, 0
        self.hit = self.busiest = 0.0

    def __call__(self, router: Router, args: tuple[Tensor, ...], chosen: tuple[Tensor, Tensor]) -> None:
        """As a forward hook."""
        if len(chosen[0]) != self.rows:
            return
        tokens = tokens_per_expert(chosen[0], self.experts)
        self.steps += 1
        self.hit += int((tokens > 0).sum())
        self.busiest += float(tokens.max() / tokens.float().mean())


@contextmanager
def counted(model: Transformer, rows: int) -> Iterator[dict[str, float]]:
    """Count in the steps of so many rows that run meanwhile, without a graph -> filled in at the end, as means of steps and layers:
    experts_hit, and busiest_expert: its tokens beside those of the mean one."""
    found: dict[str, float] = {}
    routers = [module for module in model.modules() if isinstance(module, Router)]
    loads = [Load(router.spec.num_experts, rows) for router in routers]
    hooks = [router.register_forward_hook(load) for router, load in zip(routers, loads, strict=True)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    steps = sum(load.steps for load in loads)
    found["experts_hit"] = sum(load.hit for load in loads) / steps
    found["busiest_expert"] = sum(load.busiest for load in loads) / steps


def step_bytes(model: Transformer, rows: int, context: int, experts_hit: float) -> float:
    """Bytes that a decode step has to read: the weights of the experts that are hit and of all else, and the cache."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    others = model.weight_bytes_per_token() - sum(module.bytes_per_token() for module in experts)
    whole = sum(module.bytes_per_token() / module.share for module in experts)
    cache = rows * context * model.config.cache.bytes_per_token(model.dtype)
    return others + whole * experts_hit / model.config.moe.num_experts + cache
