"""What each family's name means: a table from `model_type` to fields of `ModelConfig` and names of tensors.

`transformers` reads config.json (it knows every default that an old file leaves out, and both layouts of RoPE settings:
`rope_theta` + `rope_scaling` and `rope_parameters`); this file says what the model does with it. A family whose table
row is empty is Llama under another name. To add one, add a row, then a line in `tests/families.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from errors import UserError
from kernels.activations import ACTIVATIONS
from mla import LatentSpec
from model import ModelConfig
from moe import MoESpec
from rope import RopeSpec, yarn_mscale

Settings = Any  # a transformers PretrainedConfig

LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SANDWICH_NORMS = {  # Gemma 2 and 3
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
GLM4_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}
POST_NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def _mlp_names(prefix: str) -> tuple[list[str], list[str]]:
    """-> what makes up gate and up, and down."""
    return [f"{prefix}.gate_proj", f"{prefix}.up_proj"], [f"{prefix}.down_proj"]


@dataclass(frozen=True)
class MoENames:
    """How a checkpoint calls the tensors of a mixture of experts, inside a layer, and how it lays them out."""

    router: str = "mlp.gate"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight")  # {}: of one expert
    down: str = "mlp.experts.{}.down_proj.weight"
    shared: tuple[list[str], list[str]] = field(default_factory=lambda: _mlp_names("mlp.shared_experts"))
    shared_gate: str = "mlp.shared_expert_gate"
    transposed: bool = False  # stacked as [E, in, out]
    interleaved: bool = False  # rows of gate and up take turns


@dataclass(frozen=True)
class Family:
    """One row: the fields that differ from Llama, given the checkpoint's settings, and how its tensors are called."""

    fields: Callable[[Settings], dict[str, Any]] = lambda c: {}
    norms: dict[str, str] = field(default_factory=lambda: LLAMA_NORMS)  # our name -> theirs, inside a layer
    fused: tuple[str, ...] = ()  # of "qkv", "gate_up": stored as one tensor already
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    mlp: str = "mlp"  # of a dense layer
    moe: MoENames = field(default_factory=MoENames)
    required: tuple[str, ...] = ()  # whole numbers that config.json must name: `transformers` would make them up
    known_as: str = ""  # what `transformers` calls it, if not the same


def _gemma(c: Settings) -> dict[str, Any]:
    return dict(norm_offset=1.0, embed_scale=c.hidden_size**0.5, activation="gelu_tanh")


def _gemma2(c: Settings) -> dict[str, Any]:
    return _gemma(c) | dict(
        post_norm=True,
        scale=c.query_pre_attn_scalar**-0.5,
        attn_softcap=c.attn_logit_softcapping,
        logit_softcap=c.final_logit_softcapping,
    )


def _granite(c: Settings) -> dict[str, Any]:
    return dict(
        scale=c.attention_multiplier,
        embed_scale=c.embedding_multiplier,
        residual_scale=c.residual_multiplier,
        logit_scale=1 / c.logits_scaling,
    )


def _cohere(c: Settings) -> dict[str, Any]:
    return dict(norm_center=True, parallel=True, rope_interleaved=True, logit_scale=c.logit_scale) | (
        dict(qk_norm="heads") if getattr(c, "use_qk_norm", False) else {}
    )


def _rope_on(c: Settings, has_rope: Callable[[int], bool]) -> dict[str, Any]:
    return dict(layer_rope=[0 if has_rope(i) else None for i in range(c.num_hidden_layers)])


def _is_sliding(c: Settings, layer: int) -> bool:
    return c.layer_types[layer] == "sliding_attention"


def _exaone4(c: Settings) -> dict[str, Any]:
    """Where some layers have a window, the others have no rotation."""
    post = dict(pre_norm=False, post_norm=True, qk_norm="head")
    return post | _rope_on(c, lambda i: c.sliding_window is None or _is_sliding(c, i))


def _ministral3(c: Settings) -> dict[str, Any]:
    r = c.rope_parameters
    return dict(query_temperature=(r["llama_4_scaling_beta"], r["original_max_position_embeddings"]))


def _latent(c: Settings) -> dict[str, Any]:
    """Multi-head Latent Attention. YaRN's temperature is part of the scale, not (only) of cos and sin as elsewhere."""
    spec = LatentSpec(c.q_lora_rank or 0, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
    if spec.rope % 2:
        raise UserError(f"qk_rope_head_dim is {spec.rope}; it must be even, for dims are rotated in pairs")
    scaling, temperature = c.rope_parameters, 1.0
    if scaling["rope_type"] != "default" and scaling.get("mscale_all_dim"):
        temperature = yarn_mscale(scaling["factor"], scaling["mscale_all_dim"])
    return dict(
        latent=spec,
        head_dim=spec.head_dim,
        scale=spec.head_dim**-0.5 * temperature**2,
        ropes=[_rope_spec(c, scaling | {"partial_rotary_factor": None}, spec.rope)],
        rope_interleaved=getattr(c, "rope_interleave", True),
    )


LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _llama4_text(c: Settings) -> dict[str, Any]:
    """Layers with rope see their chunk; those without see everything, and are tempered by how much that is."""
    chunked = [kind == "chunked_attention" for kind in c.layer_types]
    fields = dict(
        chunks=[c.attention_chunk_size if is_chunked else None for is_chunked in chunked],
        rope_interleaved=True,
        qk_norm="bare" if c.use_qk_norm else "off",
        qk_norm_after_rope=True,
    )
    if c.attn_temperature_tuning:
        fields |= dict(
            query_temperature=(c.attn_scale, c.floor_scale),
            query_temperature_from=1,
            query_temperature_without_rope=True,
        )
    return fields | _rope_on(c, lambda i: bool(c.no_rope_layers[i]))


# ---- mixtures of experts


def _spec(c: Settings, experts: int | None, size: int, **knobs: Any) -> dict[str, Any]:
    """The field `moe`, with experts in all layers unless `knobs` say otherwise."""
    every = dict(layers=(True,) * c.num_hidden_layers)
    known = dict(num_experts=experts or 0, top_k=c.num_experts_per_tok or 0, intermediate_size=size)
    return dict(moe=MoESpec(**known | every | knobs))


def _mixtral(c: Settings) -> dict[str, Any]:
    return _spec(c, c.num_local_experts, c.intermediate_size, renormalize=True)


def _qwen_moe(c: Settings, **knobs: Any) -> dict[str, Any]:
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it."""
    step, dense = c.decoder_sparse_step, c.mlp_only_layers
    layers = tuple((i + 1) % step == 0 and i not in dense for i in range(c.num_hidden_layers))
    return _spec(c, c.num_experts, c.moe_intermediate_size, renormalize=c.norm_topk_prob, layers=layers, **knobs)


def _qwen2_moe(c: Settings) -> dict[str, Any]:
    return dict(qkv_bias=c.qkv_bias) | _qwen_moe(c, shared_size=c.shared_expert_intermediate_size, shared_gate=True)


def _olmoe(c: Settings) -> dict[str, Any]:
    if c.clip_qkv is not None:
        raise UserError(f"clip_qkv is {c.clip_qkv}: clipped queries, keys and values are not supported")
    return dict(qk_norm="full") | _spec(c, c.num_experts, c.intermediate_size, renormalize=c.norm_topk_prob)


def _granite_moe(c: Settings) -> dict[str, Any]:
    shared = getattr(c, "shared_intermediate_size", 0)
    spec = _spec(c, c.num_local_experts, c.intermediate_size, routing="top_k_softmax", shared_size=shared)
    return _granite(c) | spec


def _gpt_oss_moe(c: Settings) -> dict[str, Any]:
    knobs = dict(router_bias=True, bias=True, clamp=(c.swiglu_alpha, c.swiglu_limit))
    return _spec(c, c.num_local_experts, c.intermediate_size, routing="top_k_softmax", **knobs)


def _minimax_m2(c: Settings) -> dict[str, Any]:
    _require(c, "scoring_func", "sigmoid")
    knobs = dict(routing="sigmoid", correction_bias=True, renormalize=True)
    return dict(qk_norm="full") | _spec(c, c.num_local_experts, c.intermediate_size, **knobs)


def _llama4_moe(c: Settings) -> dict[str, Any]:
    """Dense layers have an MLP of their own size; the shared expert has that of the others."""
    size, layers = c.intermediate_size, tuple(i in c.moe_layers for i in range(c.num_hidden_layers))
    knobs = dict(routing="top_k_sigmoid", weigh_input=True, shared_size=size, layers=layers)
    return dict(intermediate_size=c.intermediate_size_mlp) | _spec(c, c.num_local_experts, size, **knobs)


def _deepseek_moe(c: Settings, **knobs: Any) -> dict[str, Any]:
    """What DeepSeek V2 and V3 share, and those that take after them: dense layers first, shared experts, groups."""
    types = getattr(c, "mlp_layer_types", None)
    if types is None:
        types = ["dense" if i < c.first_k_dense_replace else "sparse" for i in range(c.num_hidden_layers)]
    known = dict(
        layers=tuple(t == "sparse" for t in types),
        scale=c.routed_scaling_factor,
        groups=c.n_group or 1,
        topk_groups=c.topk_group or 1,
        shared_size=c.moe_intermediate_size * (c.n_shared_experts or 0),
    )
    return _spec(c, c.n_routed_experts, c.moe_intermediate_size, **known | knobs)


def _deepseek_v2_moe(c: Settings) -> dict[str, Any]:
    _require(c, "scoring_func", "softmax")
    _require(c, "topk_method", "greedy", "group_limited_greedy")
    _require(c, "norm_topk_prob", False, None)  # what V2's own code does with it, no other code does
    greedy = dict(groups=1, topk_groups=1) if c.topk_method == "greedy" else {}
    return _deepseek_moe(c, **greedy)


def _deepseek_v3_moe(c: Settings) -> dict[str, Any]:
    """GLM 4.5 and 4.7 Flash, dots1 and Kimi K2 do the same."""
    _require(c, "scoring_func", "sigmoid")
    _require(c, "topk_method", "noaux_tc")
    knobs = dict(routing="sigmoid", correction_bias=True, group_score="top2", renormalize=c.norm_topk_prob)
    return _deepseek_moe(c, **knobs)


def _mistral4_moe(c: Settings) -> dict[str, Any]:
    return _deepseek_moe(c, group_score="top2", renormalize=c.norm_topk_prob)


def _require(c: Settings, name: str, *values: Any) -> None:
    """UserError unless the setting is one of `values` or is not there at all."""
    value = getattr(c, name, values[0])
    if value not in values:
        raise UserError(
            f"{name} {value!r} of a {c.model_type} model is not supported; it must be {' or '.join(map(repr, values))}"
        )


MIXTRAL_NAMES = MoENames(
    router="block_sparse_moe.gate",
    correction_bias="block_sparse_moe.e_score_correction_bias",
    gate_up=("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    down="block_sparse_moe.experts.{}.w2.weight",
)
GRANITE_NAMES = MoENames(
    router="block_sparse_moe.router.layer",
    gate_up=("block_sparse_moe.input_linear.weight",),
    down="block_sparse_moe.output_linear.weight",
    shared=(["shared_mlp.input_linear"], ["shared_mlp.output_linear"]),
)
STACKED_NAMES = MoENames(gate_up=("mlp.experts.gate_up_proj",), down="mlp.experts.down_proj")  # Mistral 4
GPT_OSS_NAMES = MoENames(
    router="mlp.router",
    gate_up=("mlp.experts.gate_up_proj",),
    down="mlp.experts.down_proj",
    transposed=True,
    interleaved=True,
)
LLAMA4_NAMES = MoENames(
    router="feed_forward.router",
    gate_up=("feed_forward.experts.gate_up_proj",),
    down="feed_forward.experts.down_proj",
    shared=_mlp_names("feed_forward.shared_expert"),
    transposed=True,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "cwm": Family(),
    "internlm3": Family(),
    "mistral": Family(),
    "ministral": Family(),
    "ministral3": Family(_ministral3),
    "qwen2": Family(lambda c: dict(qkv_bias=True)),
    "qwen3": Family(lambda c: dict(qk_norm="head")),
    "seed_oss": Family(lambda c: dict(out_bias=c.attention_out_bias)),
    "smollm3": Family(lambda c: _rope_on(c, lambda i: bool(c.no_rope_layers[i]))),
    "gemma": Family(_gemma),
    "gemma2": Family(_gemma2, SANDWICH_NORMS),
    "gemma3_text": Family(lambda c: _gemma2(c) | dict(attn_softcap=None, qk_norm="head"), SANDWICH_NORMS),
    "phi3": Family(fused=("qkv", "gate_up")),
    "olmo2": Family(lambda c: dict(pre_norm=False, post_norm=True, qk_norm="full"), POST_NORMS),
    "olmo3": Family(lambda c: dict(pre_norm=False, post_norm=True, qk_norm="full"), POST_NORMS),
    "exaone4": Family(_exaone4, POST_NORMS),
    "granite": Family(_granite),
    "cohere": Family(_cohere, {"attn_norm": "input_layernorm"}),
    "cohere2": Family(
        lambda c: _cohere(c) | _rope_on(c, lambda i: _is_sliding(c, i)), {"attn_norm": "input_layernorm"}
    ),
    "glm": Family(lambda c: dict(rope_interleaved=True, out_bias=False), fused=("gate_up",)),
    "glm4": Family(
        lambda c: dict(rope_interleaved=True, out_bias=False, post_norm=True), GLM4_NORMS, fused=("gate_up",)
    ),
    "hunyuan_v1_dense": Family(
        lambda c: dict(qk_norm="head", qk_norm_after_rope=True), qk_norm_names=("query_layernorm", "key_layernorm")
    ),
    "gpt_oss": Family(lambda c: dict(sinks=True) | _gpt_oss_moe(c), moe=GPT_OSS_NAMES),
    "llama4_text": Family(lambda c: _llama4_text(c) | _llama4_moe(c), mlp="feed_forward", moe=LLAMA4_NAMES),
    "deepseek_v2": Family(lambda c: _latent(c) | _deepseek_v2_moe(c), required=LATENT_SIZES),
    "deepseek_v3": Family(lambda c: _latent(c) | _deepseek_v3_moe(c), required=LATENT_SIZES),
    "kimi_k2": Family(lambda c: _latent(c) | _deepseek_v3_moe(c), required=LATENT_SIZES, known_as="deepseek_v3"),
    "glm4_moe_lite": Family(lambda c: _latent(c) | _deepseek_v3_moe(c), required=LATENT_SIZES),
    "mistral4": Family(
        lambda c: _latent(c) | _ministral3(c) | _mistral4_moe(c), moe=STACKED_NAMES, required=LATENT_SIZES
    ),
    "youtu": Family(_latent, required=LATENT_SIZES),
    "ernie4_5": Family(
        lambda c: dict(rope_interleaved=True, qkv_bias=c.use_bias, out_bias=c.use_bias, mlp_bias=c.use_bias)
    ),
    "mixtral": Family(_mixtral, moe=MIXTRAL_NAMES),
    "minimax_m2": Family(_minimax_m2, moe=MIXTRAL_NAMES),
    "qwen2_moe": Family(_qwen2_moe, moe=MoENames(shared=_mlp_names("mlp.shared_expert"))),
    "qwen3_moe": Family(lambda c: dict(qk_norm="head") | _qwen_moe(c)),
    "olmoe": Family(_olmoe),
    "granitemoe": Family(_granite_moe, moe=GRANITE_NAMES),
    "granitemoeshared": Family(_granite_moe, moe=GRANITE_NAMES),
    "glm4_moe": Family(
        lambda c: dict(out_bias=False, qk_norm="head" if c.use_qk_norm else "off") | _deepseek_v3_moe(c)
    ),
    "dots1": Family(lambda c: dict(qk_norm="head") | _deepseek_v3_moe(c)),
}


WRAPPERS = {
    "llama4": ("llama4_text", "language_model.")
}  # a model with more than text -> its text model, its tensors' prefix


def text_model(raw: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The contents of a config.json -> those of its text model, and what the names of its tensors begin with ("": nothing)."""
    name, prefix = WRAPPERS.get(raw.get("model_type"), ("", ""))
    if not name:
        return raw, ""
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        raise UserError(f"config.json of a {raw['model_type']} model must have a text_config, not {inner!r}")
    outer = {key: raw[key] for key in ("dtype", "torch_dtype", "eos_token_id", "quantization_config") if key in raw}
    return outer | inner | {"model_type": name}, prefix


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """The contents of a config.json -> ModelConfig. UserError names what is unknown, and what is known."""
    from transformers import AutoConfig  # imported late: half a second that `--help` need not pay

    name = raw.get("model_type")
    if name not in FAMILIES:
        architectures = ", ".join(raw.get("architectures") or [])
        raise UserError(
            f"model type {name!r}{f' ({architectures})' if architectures else ''} is not supported; "
            f"these are: {', '.join(sorted([*FAMILIES, *WRAPPERS]))}"
        )
    family = FAMILIES[name]
    for required in family.required:
        if not isinstance(raw.get(required), int) or raw[required] < 1:
            value = repr(raw[required]) if required in raw else "missing"
            raise UserError(
                f"config.json of a {name} model: {required} is {value}; it must be a whole number, at least 1"
            )
    try:
        settings = AutoConfig.for_model(**raw | {"model_type": family.known_as or name})
    except Exception as error:  # transformers raises many kinds here; each means that the file makes no sense
        raise UserError(f"config.json of a {name} model is not valid: {' '.join(str(error).split())}") from error
    fields = _common_fields(settings) | family.fields(settings)
    if fields["activation"] not in ACTIVATIONS:
        raise UserError(f"activation {fields['activation']!r} is not supported; these are: {', '.join(ACTIVATIONS)}")
    return ModelConfig(**fields)


def _common_fields(c: Settings) -> dict[str, Any]:
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention_bias = getattr(c, "attention_bias", False)
    ropes, layer_rope = _ropes(c, head_dim)
    activation = getattr(c, "hidden_activation", None) or c.hidden_act
    return dict(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads or c.num_attention_heads,
        head_dim=head_dim,
        intermediate_size=c.intermediate_size,
        max_position=c.max_position_embeddings,
        norm_eps=c.layer_norm_eps if hasattr(c, "layer_norm_eps") else c.rms_norm_eps,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=getattr(c, "mlp_bias", False),
        windows=_windows(c),
        ropes=ropes,
        layer_rope=layer_rope,
        activation={"gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation),
        tie_embeddings=c.tie_word_embeddings,
    )


def _windows(c: Settings) -> list[int | None]:
    """With `layer_types` only the layers that it names have the window; without, all have it (Mistral, Phi-3)."""
    window = getattr(c, "sliding_window", None) if getattr(c, "use_sliding_window", True) else None
    if getattr(c, "layer_types", None) is None:
        return [window] * c.num_hidden_layers
    return [window if _is_sliding(c, i) else None for i in range(c.num_hidden_layers)]


def _ropes(c: Settings, head_dim: int) -> tuple[list[RopeSpec], list[int]]:
    """-> the distinct rotary embeddings, and which one each layer uses. Some families key them by layer type."""
    parameters = c.rope_parameters
    keyed = "full_attention" in parameters
    types = sorted(set(c.layer_types)) if keyed else [None]
    specs = [_rope_spec(c, parameters[t] if keyed else parameters, head_dim) for t in types]
    return specs, [types.index(c.layer_types[i]) if keyed else 0 for i in range(c.num_hidden_layers)]


def _rope_spec(c: Settings, parameters: dict[str, Any], head_dim: int) -> RopeSpec:
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
    original = getattr(c, "original_max_position_embeddings", None)  # Phi-3 keeps it outside, and that one counts
    if original and scaling.get("rope_type") == "longrope":
        scaling["original_max_position_embeddings"] = original
    return RopeSpec(
        theta=parameters["rope_theta"],
        dim=int(head_dim * (parameters.get("partial_rotary_factor") or 1.0)),
        max_position=c.max_position_embeddings,
        scaling=scaling,
    )
