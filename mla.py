"""Multi-head Latent Attention (DeepSeek-V2, 2024): the cache holds one vector of a token, whatever the number of heads.

Ordinary attention caches H keys and values of a token. MLA caches what they are made from: a latent c of R numbers, and one
key k_r that carries the position, shared by all heads. With DeepSeek-V3's 128 heads that is 1,152 bytes a layer instead of
81,920. For hidden state x of one token:

    q_h = [q_nope,h | q_rope,h]     [nope | rope]     of W_q x, or of W_qb norm(W_qa x) with a query rank
    c   = norm(W_c x)               [R]               } a row of the cache: [c | k_r], R + rope numbers
    k_r = rotate(W_r x)             [rope]            }
    k_h = [W_K,h c | k_r]           [nope | rope]     W_K [H, nope, R]
    v_h = W_V,h c                   [V]               W_V [H, V, R]

Attention over those k_h and v_h is the *expanded* form. The *absorbed* form never makes them. A score is

    q_nope,h . (W_K,h c) + q_rope,h . k_r  =  (W_K,h' q_nope,h) . c + q_rope,h . k_r

so all heads attend to the rows of the cache as they lie, with queries of R + rope numbers, and since W_V is linear, it can be
applied to the weighted mean of the latents [R] instead of to each of them. For L entries and Q queries:

    expanded:  2 H (nope + rope + V) Q L  +  2 H R (nope + V) L  operations, and reads or makes H (nope + rope + V) numbers an entry
    absorbed:  2 H (2 R + rope) Q L       +  2 H R (nope + V) Q  operations, and reads R + rope numbers an entry

A decode (Q = 1) is for the absorbed form, a prompt for the expanded one; `kernels/latent.py` counts. They give the same numbers.

    python -m pytest tests/test_latent.py

Shapes: T new tokens, H heads, R latent rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.dispatch import attend_latent, write_latent
from layers import Linear, Norm, StepContext


@dataclass(frozen=True)
class LatentSpec:
    """The dimensions of one model's MLA."""

    query_rank: int  # 0: queries are a projection of the hidden state, without a latent of their own
    rank: int  # R
    nope: int  # of a query and key: dims without a position
    rope: int  # and those that are rotated
    value: int
    norm_eps: float = 1e-6  # of the norms of the latents, whatever eps the model's other norms have

    @property
    def head_dim(self) -> int:
        """Of queries and expanded keys."""
        return self.nope + self.rope

    @property
    def row(self) -> int:
        """Numbers that the cache keeps of a token in a layer."""
        return self.rank + self.rope


class LatentAttention(nn.Module):
    def __init__(
        self,
        spec: LatentSpec,
        hidden_size: int,
        heads: int,
        scale: float,
        rope: int,
        interleaved: bool,
        down_bias: bool,
        out_bias: bool,
    ):
        """`scale`: of the scores, YaRN's share of it included. `rope`: index of the rotation in the step's `cos_sin`."""
        super().__init__()
        self.spec, self.heads, self.scale, self.rope, self.interleaved = spec, heads, scale, rope, interleaved
        self.q_down = self.q_norm = nn.Identity()
        if spec.query_rank:
            self.q_down = Linear(hidden_size, spec.query_rank, down_bias)
            self.q_norm = Norm(spec.query_rank, spec.norm_eps)
        self.q_up = Linear(spec.query_rank or hidden_size, heads * spec.head_dim, bias=False)
        self.kv_down = Linear(hidden_size, spec.row, down_bias)
        self.kv_norm = Norm(spec.rank, spec.norm_eps)
        # [W_K,h | W_V,h] of one head after the other. Never packed: both forms take it apart by heads.
        self.kv_up = nn.Parameter(torch.empty(heads * (spec.nope + spec.value), spec.rank), requires_grad=False)
        self.out = Linear(heads * spec.value, hidden_size, out_bias)

    def forward(self, x: Tensor, kv: tuple[Tensor], step: StepContext) -> Tensor:
        """x [T, hidden], kv: this layer's rows [slots, R + rope] (written here) -> [T, hidden]."""
        s, (cache,) = self.spec, kv
        q = self.q_up(self.q_norm(self.q_down(x))).view(x.shape[0], self.heads, s.head_dim)
        q_nope, q_rope = q.split([s.nope, s.rope], -1)
        latent, k_rope = self.kv_down(x).split([s.rank, s.rope], -1)
        latent = self.kv_norm(latent)
        q_rope = write_latent(step.layout, q_rope, k_rope, latent, cache, step.cos_sin[self.rope], self.interleaved)
        if step.query_scale is not None:
            q_nope, q_rope = q_nope * step.query_scale, q_rope * step.query_scale
        kv_up = self.kv_up.view(self.heads, s.nope + s.value, s.rank)
        return self.out(attend_latent(step.layout, q_nope, q_rope, kv_up, cache, self.scale).flatten(1))
