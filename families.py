"""What each family's name means: a table from `model_type` to fields of `ModelConfig` and names of tensors.

`transformers` reads config.json (it knows every default that an old file leaves out, and both layouts of RoPE settings:
`rope_theta` + `rope_scaling` and `rope_parameters`); this file says what the model does with it. A family whose table
row is empty is Llama under another name. To add one, add a row, then a line in `tests/families.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from errors import UserError
from layers import ACTIVATIONS
from model import ModelConfig
from rope import RopeSpec

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


@dataclass(frozen=True)
class Family:
    """One row: the fields that differ from Llama, given the checkpoint's settings, and how its tensors are called."""

    fields: Callable[[Settings], dict[str, Any]] = lambda c: {}
    norms: dict[str, str] = field(default_factory=lambda: LLAMA_NORMS)  # our name -> theirs, inside a layer
    fused: tuple[str, ...] = ()  # of "qkv", "gate_up": stored as one tensor already
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")


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
    "ernie4_5": Family(
        lambda c: dict(rope_interleaved=True, qkv_bias=c.use_bias, out_bias=c.use_bias, mlp_bias=c.use_bias)
    ),
}


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """The contents of a config.json -> ModelConfig. UserError names what is unknown, and what is known."""
    from transformers import AutoConfig  # imported late: half a second that `--help` need not pay

    name = raw.get("model_type")
    if name not in FAMILIES:
        architectures = ", ".join(raw.get("architectures") or [])
        raise UserError(
            f"model type {name!r}{f' ({architectures})' if architectures else ''} is not supported; "
            f"these are: {', '.join(sorted(FAMILIES))}"
        )
    try:
        settings = AutoConfig.for_model(**raw)
    except Exception as error:  # transformers raises many kinds here; each means that the file makes no sense
        raise UserError(f"config.json of a {name} model is not valid: {' '.join(str(error).split())}") from error
    fields = _common_fields(settings) | FAMILIES[name].fields(settings)
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
