"""The model: one decoder-only Transformer, and a config whose fields are the differences between families.

Llama, Qwen, Mistral, Gemma, Phi, OLMo, Granite, Cohere and the rest are the same block with a few switches: where the
norms sit, how a head is rotated, which layers see a window, what is scaled by what. There is one `Attention`, one `MLP`,
one `MoE` (`moe.py`), one `Block`; `families.py` says which switches each name sets, `checkpoint.py` fills in the weights.

    python generate.py --model assets/folio-tiny --prompt "Once upon a time"

Shapes: T new tokens in this step, of all its sequences; H query heads, K KV heads, D head dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cache.pages import CacheLayout
from device import from_host
from kernels.dispatch import Layout, attend, lay_out, lay_out_decode, write
from kernels.reference_write import rotate
from kernels.variants import Variant, model_variant
from layers import MLP, BareNorm, Linear, Norm, StepContext
from mla import LatentAttention, LatentSpec
from moe import Experts, MoE, MoESpec
from rope import RopeSpec, inverse_frequencies

KVCache = list[tuple[Tensor, ...]]  # a layer: keys and values, each [slots, K, D]; with MLA its rows [slots, R + rope]


@dataclass
class ModelConfig:
    """What shapes a decoder. The defaults are Llama's; a field that a family does not use stays off."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int

    # the block
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma stores w - 1
    norm_center: bool = False  # LayerNorm (without bias) instead of RMSNorm
    pre_norm: bool = True  # normalise the input of attention and MLP
    post_norm: bool = False  # normalise their output, before it is added to the residual
    parallel: bool = False  # attention and MLP side by side on one norm (Cohere)

    # attention
    qkv_bias: bool = False
    out_bias: bool = False
    # "head": each head by itself; "heads": likewise with a weight for each head; "full": all as one; "bare": each head by
    # itself without a weight, in the layers that have rope
    qk_norm: str = "off"
    qk_norm_after_rope: bool = False
    scale: float = 0.0  # of the scores; 0 means head_dim ** -0.5
    attn_softcap: float | None = None
    windows: list[int | None] = field(default_factory=list)  # each layer's sliding window, None = sees everything
    chunks: list[int | None] = field(default_factory=list)  # each layer's chunk size: a token sees its own chunk only
    sinks: bool = False  # a learnt score for each head that belongs to no key: see `Variant`
    ropes: list[RopeSpec] = field(default_factory=list)
    layer_rope: list[int | None] = field(default_factory=list)  # each layer's index into `ropes`, None = no rotation
    rope_interleaved: bool = False  # pairs (0, 1), (2, 3) ... instead of (0, D/2), (1, D/2 + 1) ...
    query_temperature: tuple[float, int] | None = None  # (beta, L0): q *= 1 + beta ln(1 + floor(position / L0))
    query_temperature_from: int = 0  # the position of the first token in that
    query_temperature_without_rope: bool = False  # only in the layers that have no rope
    latent: LatentSpec | None = None  # Multi-head Latent Attention instead; head_dim is then that of its queries

    # MLP
    activation: str = "silu"
    mlp_bias: bool = False
    moe: MoESpec | None = None  # some layers or all have experts in the MLP's place

    # ends
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        self.scale = self.scale or self.head_dim**-0.5
        self.windows = self.windows or [None] * self.num_layers
        self.chunks = self.chunks or [None] * self.num_layers
        self.layer_rope = self.layer_rope or [0] * self.num_layers

    @property
    def cache(self) -> CacheLayout:
        """What is kept of each token."""
        heads = (self.num_kv_heads, self.head_dim)
        return CacheLayout(self.num_layers, (heads, heads) if self.latent is None else ((self.latent.row,),))

    @property
    def norm(self) -> tuple[float, float, bool]:
        """What a `Norm` of this model is made with, besides its shape."""
        return self.norm_eps, self.norm_offset, self.norm_center


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.rope = config, config.layer_rope[layer]
        self.variant = model_variant(config.attn_softcap, config.windows[layer], config.chunks[layer])
        self.tempered = self.rope is None or not config.query_temperature_without_rope
        H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = Linear(config.hidden_size, (H + 2 * K) * D, config.qkv_bias)
        self.out = Linear(H * D, config.hidden_size, config.out_bias)
        self.sinks = nn.Parameter(torch.empty(H), requires_grad=False) if config.sinks else None
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm == "bare":
            if self.rope is not None:
                self.q_norm = self.k_norm = BareNorm(config.norm_eps)
        elif config.qk_norm != "off":
            self.q_norm = Norm({"head": (D,), "heads": (H, D), "full": (H * D,)}[config.qk_norm], *config.norm)
            self.k_norm = Norm({"head": (D,), "heads": (K, D), "full": (K * D,)}[config.qk_norm], *config.norm)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], step: StepContext) -> Tensor:
        """x [T, hidden], kv: this layer's keys and values [slots, K, D] (written here) -> [T, hidden]."""
        c, layout = self.config, step.layout
        q, k, v = self.qkv(x).split([n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)], -1)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.reshape(x.shape[0], -1, c.head_dim) for t in (q, k, v))
        cos_sin = None if self.rope is None else step.cos_sin[self.rope]
        if c.qk_norm in ("head", "heads", "bare"):
            if c.qk_norm_after_rope and cos_sin is not None:
                q, k = (rotate(t, *cos_sin, c.rope_interleaved) for t in (q, k))
                cos_sin = None  # done
            q, k = self.q_norm(q), self.k_norm(k)
        q = write(layout, q, k, v, *kv, cos_sin, c.rope_interleaved)
        if step.query_scale is not None and self.tempered:
            q = q * step.query_scale
        out = attend(layout, q, *kv, c.scale, self.variant, self.sinks)
        return self.out(out.flatten(1))


def attention(config: ModelConfig, layer: int) -> nn.Module:
    """The attention of one layer: of heads, or of a latent."""
    c = config
    if c.latent is None:
        return Attention(c, layer)
    sizes, rope = (c.latent, c.hidden_size, c.num_heads), c.layer_rope[layer]
    return LatentAttention(*sizes, c.scale, rope, c.rope_interleaved, c.qkv_bias, c.out_bias)


class Block(nn.Module):
    """Attention and MLP on a residual stream, with a norm before, after or on both sides of each."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()

        def norm(present: bool) -> nn.Module:
            return Norm(config.hidden_size, *config.norm) if present else nn.Identity()

        self.config = config
        self.attn_norm, self.attn_post_norm = norm(config.pre_norm), norm(config.post_norm)
        self.attn = attention(config, layer)
        self.mlp_norm, self.mlp_post_norm = norm(config.pre_norm and not config.parallel), norm(config.post_norm)
        if config.moe is not None and config.moe.layers[layer]:
            self.mlp = MoE(config.hidden_size, config.moe, config.activation)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias, config.activation)

    @torch.compiler.nested_compile_region  # layers that are alike are compiled once, not once each
    def forward(self, x: Tensor, kv: tuple[Tensor, ...], step: StepContext) -> Tensor:
        scale = self.config.residual_scale
        if self.config.parallel:
            h = self.attn_norm(x)
            return x + (self.attn(h, kv, step) + self.mlp(h)) * scale
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), kv, step)) * scale
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))) * scale


class Transformer(nn.Module):
    """ids -> hidden states -> logits. Owns the weights; the pages that it writes to are handed in."""

    def __init__(self, config: ModelConfig, max_model_len: int | None = None):
        """`max_model_len`: the longest sequence that will be served (default: what the checkpoint allows)."""
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.variants = [] if config.latent else [block.attn.variant for block in self.blocks]  # MLA knows none
        self.norm = Norm(config.hidden_size, *config.norm)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope_factors: list[float] = []
        for i, spec in enumerate(config.ropes):
            with torch.device("cpu"):  # the weights may be made on "meta"; these few numbers never are
                inv_freq, factor = inverse_frequencies(spec, max_model_len or config.max_position)
            self.register_buffer(f"inv_freq_{i}", inv_freq, persistent=False)
            self.rope_factors.append(factor)

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation; the embedding table may stay in the file's own."""
        return self.norm.weight.dtype

    def forward(self, ids: Tensor, layout: Layout, kv: KVCache) -> Tensor:
        """ids [T] of the step's new tokens -> hidden states [T, hidden].

        Writes the keys and values of the new tokens to their pages; attends to them and to all that is before them.
        """
        step = self.step_context(layout)
        x = self.embed(ids).to(self.dtype)
        if self.config.embed_scale != 1.0:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)  # rounded to the model's dtype, as in training
        for block, layer_kv in zip(self.blocks, kv, strict=True):
            x = block(x, layer_kv, step)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> logits [..., V] float32."""
        logits = self.head(hidden).float() * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def step_context(self, layout: Layout) -> StepContext:
        cos_sin = []
        for i, factor in enumerate(self.rope_factors):
            angles = layout.positions[:, None].float() * getattr(self, f"inv_freq_{i}")
            cos_sin.append((angles.cos() * factor, angles.sin() * factor))
        query_scale = None
        if self.config.query_temperature is not None:
            beta, length = self.config.query_temperature
            turns = (layout.positions + self.config.query_temperature_from) // length
            query_scale = (1 + beta * torch.log(1 + turns.float())).to(self.dtype)[:, None, None]
        return StepContext(layout, cos_sin, query_scale)

    def lay_out(
        self,
        starts: Sequence[int],
        lengths: Sequence[int],
        page_table: Tensor,
        page_size: int,
        attention: str = "sdpa",
        spans: Tensor | None = None,
    ) -> Layout:
        """starts, lengths [B] of each sequence's new tokens, page_table [B, N] -> the step's Layout for this model.

        `attention`: a backend of `kernels/dispatch.py`. `spans` [2, B]: starts and lengths, if they are on the device already.
        """
        if spans is None:
            spans = from_host([starts, lengths], page_table.device)
        return lay_out(starts, lengths, spans, page_table, page_size, attention, *self._kinds)

    def lay_out_decode(self, positions: Tensor, page_table: Tensor, page_size: int, attention: str = "sdpa") -> Layout:
        """positions [B] of one new token each, page_table [B, N] -> the same, from what is on the device alone."""
        return lay_out_decode(positions, page_table, page_size, attention, *self._kinds)

    @property
    def _kinds(self) -> tuple[list[Variant], int, torch.dtype]:
        """What a layout depends on: the layers' variants, query heads of one KV head, the dtype."""
        return self.variants, self.config.num_heads // self.config.num_kv_heads, self.dtype

    def pack(self) -> None:
        """Lay every linear weight out for this CPU (see `kernels/linear.py`). Does nothing on a GPU."""
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.pack()

    def unpack(self) -> None:
        """Lay every linear weight out plainly, for a compiled step of one row (see `kernels/linear.py`)."""
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.unpack()

    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that a decode step of one row has to read: of the embedding table a row, of E experts k, all else."""
        experts = [m for m in self.modules() if isinstance(m, Experts)]
        others = [m for m in self.modules() if not isinstance(m, Experts) and m is not self.embed]
        weights = {id(w): w for m in others for w in m.parameters(recurse=False)}
        read = sum(w.numel() * w.element_size() for w in weights.values())
        return read + sum(m.bytes_per_token() for m in experts)
