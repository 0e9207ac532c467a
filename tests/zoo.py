"""Tiny random models of every family, for parity against `transformers`.

Each entry of FAMILIES makes a `transformers` config of 100-300 thousand weights in which every knob of that family
is switched on and set to a value nobody would guess: a window shorter than the prompts, soft caps that bite, an
epsilon that matters, two different rope bases, multipliers unlike 1. `build` then randomises all parameters, norms
and biases included, so that a forgotten weight changes the logits by far more than rounding does.

    model = build("gemma3")          # float32, eval, eager attention; the same weights every time
    save(model, folder)              # config.json + model.safetensors, as a downloaded checkpoint would have them
    make_legacy(folder)              # config.json in the layout of transformers 4

No end-of-sequence token inside the vocabulary: greedy runs go the full length. Logits are about 1 to 8 in size;
`transformers` itself, cached against uncached, differs by up to 5e-5.
"""

import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mistral4ForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 128
WINDOW = 16  # make prompts longer than this
MAX_POSITION = 256

# Shared shape. head_dim 32 is on purpose not hidden_size / heads; families without the key fall back to 16.
TINY: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=MAX_POSITION,
    rms_norm_eps=0.01,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=None,  # glm, glm4 and cwm then fill in ids beyond the vocabulary
    pad_token_id=0,
)


def rope(kind: str = "default", theta: float = 1000.0, **knobs: Any) -> dict[str, Any]:
    """A `rope_parameters` dict; the small default base makes all frequencies turn within 100 tokens."""
    return {"rope_type": kind, "rope_theta": theta, **knobs}


def layers(pattern: str) -> list[str]:
    """`layer_types` from one letter a layer: "LLLG" -> three windowed layers, then a full one."""
    return [{"L": "sliding_attention", "G": "full_attention"}[c] for c in pattern]


def family(model_type: str, **knobs: Any) -> Callable[[], PretrainedConfig]:
    """A factory for the config of `model_type`: the shared shape, overridden by `knobs`."""
    merged = {"rope_parameters": rope(), **TINY, **knobs}
    if model_type in ("cohere", "cohere2"):
        merged["layer_norm_eps"] = merged.pop("rms_norm_eps")
    # A deep copy each time: the config classes edit `rope_parameters` in place.
    return lambda: AutoConfig.for_model(model_type, **copy.deepcopy(merged))


LLAMA3_ROPE = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN_ROPE = rope("yarn", factor=8.0, beta_fast=1.0, beta_slow=0.25, original_max_position_embeddings=32)
LONGROPE = rope(
    "longrope",
    partial_rotary_factor=0.75,  # 12 of 16 channels turn, so 6 frequencies
    short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    long_factor=[1.5, 2.0, 3.0, 5.0, 8.0, 13.0],
)

DEEPSEEK: dict[str, Any] = dict(  # the routing of DeepSeek-V3, in four groups of two
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=40,
    n_shared_experts=2,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=1.7,
)
# Multi-head Latent Attention: no two sizes alike. YaRN as DeepSeek has it, with two different mscales.
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4,
    q_lora_rank=40,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=20,
)
LATENT_YARN = rope("yarn", factor=8.0, original_max_position_embeddings=32, mscale=1.3, mscale_all_dim=0.8)

LLAMA4: dict[str, Any] = dict(
    head_dim=32,
    intermediate_size_mlp=80,
    attention_chunk_size=12,
    floor_scale=8,
    attn_scale=0.4,
    rope_parameters=LLAMA3_ROPE,
)

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    # llama and what is llama in all but name
    "llama2": family("llama", num_key_value_heads=4),
    "llama3": family("llama", head_dim=32, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama_bias": family("llama", head_dim=32, attention_bias=True, mlp_bias=True),
    "llama_linear": family("llama", rope_parameters=rope("linear", factor=4.0)),
    "llama_yarn": family("llama", head_dim=32, rope_parameters=YARN_ROPE),
    "llama_yarn_factor": family("llama", rope_parameters={**YARN_ROPE, "attention_factor": 0.7, "truncate": False}),
    "smollm2": family("llama", num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=rope(theta=300.0)),
    "internlm3": family(
        "internlm3", head_dim=32, qkv_bias=True, bias=True, rope_parameters=rope("dynamic", factor=6.0)
    ),
    "cwm": family("cwm", head_dim=32, sliding_window=WINDOW, rope_parameters=LLAMA3_ROPE),
    "seed_oss": family("seed_oss", head_dim=32, attention_bias=True, attention_out_bias=False, mlp_bias=True),
    # qwen
    "qwen2": family("qwen2", tie_word_embeddings=True),
    "qwen2_yarn": family("qwen2", rope_parameters=YARN_ROPE),
    "qwen2_window": family("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": family("qwen3", head_dim=32, attention_bias=True),
    # mistral
    "mistral": family("mistral", head_dim=32, sliding_window=WINDOW),
    "ministral": family("ministral", head_dim=32, sliding_window=WINDOW, layer_types=layers("GLLL")),
    "ministral3": family(
        "ministral3",
        head_dim=32,
        rope_parameters={**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
    ),
    # smollm3: every fourth layer without rope; here also windowed there
    "smollm3": family("smollm3", no_rope_layers=[1, 1, 1, 0], tie_word_embeddings=True),
    "smollm3_window": family(
        "smollm3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW, attention_bias=True
    ),
    # gemma
    "gemma": family("gemma", head_dim=32, num_key_value_heads=1, tie_word_embeddings=True),
    "gemma2": family(
        "gemma2",
        head_dim=32,
        sliding_window=WINDOW,
        query_pre_attn_scalar=2,
        attn_logit_softcapping=6.0,
        final_logit_softcapping=1.5,
        tie_word_embeddings=True,
    ),
    "gemma3": family(
        "gemma3_text",
        num_hidden_layers=6,
        head_dim=32,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": rope("linear", theta=1000.0, factor=4.0),
            "sliding_attention": rope(theta=100.0),
        },
        tie_word_embeddings=True,
    ),
    # phi: fused qkv and gate_up
    "phi3": family("phi3", sliding_window=WINDOW, num_key_value_heads=4),
    "phi3_longrope": family("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=48),
    "phi4": family("phi3", rope_parameters=rope(theta=300.0)),
    "phi4_mini": family(
        "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=MAX_POSITION, tie_word_embeddings=True
    ),
    # norms after the block
    "olmo2": family("olmo2"),
    "olmo3": family(
        "olmo3",
        attention_bias=True,
        sliding_window=WINDOW,
        rope_parameters={"full_attention": YARN_ROPE, "sliding_attention": rope()},
    ),
    "exaone4": family("exaone4", sliding_window=WINDOW, sliding_window_pattern=4, head_dim=32),
    "exaone4_full": family(  # no window at all: then every layer has rope
        "exaone4",
        sliding_window=None,
        layer_types=layers("GGGG"),
        rope_parameters=LLAMA3_ROPE,
        tie_word_embeddings=True,
    ),
    # multipliers
    "granite": family(
        "granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.4,
        residual_multiplier=0.6,
        logits_scaling=1.7,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    # one norm, attention and MLP in parallel
    "cohere": family("cohere", logit_scale=0.7, tie_word_embeddings=True),
    "cohere_qk_norm": family("cohere", logit_scale=0.7, use_qk_norm=True, attention_bias=True),
    "cohere2": family("cohere2", logit_scale=0.7, sliding_window=WINDOW, tie_word_embeddings=True),
    # interleaved rope
    "glm": family("glm", head_dim=32, partial_rotary_factor=0.5),
    "glm4": family("glm4", head_dim=32, partial_rotary_factor=0.5),
    # chunks, rope but on every fourth layer, a temperature there; without experts, and with them in every second layer
    "llama4_dense": family("llama4_text", **LLAMA4, moe_layers=[], attention_bias=True),
    "llama4": family("llama4_text", **LLAMA4, interleave_moe_layer_step=2, num_local_experts=4, num_experts_per_tok=2),
    "ernie4_5": family("ernie4_5", head_dim=32, use_bias=True, tie_word_embeddings=True),
    # qk-norm after rope
    "hunyuan": family(
        "hunyuan_v1_dense",
        head_dim=32,
        rope_parameters=rope("dynamic", factor=1.0, alpha=5.0),  # a fixed base, whatever its name says
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    # mixtures of experts
    "mixtral": family("mixtral", head_dim=32, num_local_experts=5, num_experts_per_tok=2, sliding_window=WINDOW),
    "qwen2_moe": family(
        "qwen2_moe",
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=56,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    "qwen3_moe": family(
        "qwen3_moe",
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "olmoe": family("olmoe", num_experts=7, num_experts_per_tok=3),
    "olmoe_renormalized": family("olmoe", num_experts=7, num_experts_per_tok=3, norm_topk_prob=True),
    "granitemoe": family(
        "granitemoe",
        num_local_experts=5,
        num_experts_per_tok=2,
        embedding_multiplier=3.0,
        attention_multiplier=0.4,
        residual_multiplier=0.6,
        logits_scaling=1.7,
        tie_word_embeddings=True,
    ),
    "granitemoeshared": family(
        "granitemoeshared",
        num_local_experts=5,
        num_experts_per_tok=2,
        shared_intermediate_size=56,
        attention_multiplier=0.4,
    ),
    "glm4_moe": family("glm4_moe", head_dim=32, partial_rotary_factor=0.5, use_qk_norm=True, **DEEPSEEK),
    "glm4_moe_bare": family("glm4_moe", attention_bias=True, **DEEPSEEK | dict(n_group=1, topk_group=1)),
    "dots1": family("dots1", **DEEPSEEK | dict(norm_topk_prob=False)),
    "minimax_m2": family("minimax_m2", head_dim=32, num_local_experts=8, num_experts_per_tok=3),
    "gpt_oss": family(
        "gpt_oss",
        head_dim=32,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        swiglu_limit=1.5,
        rope_parameters={**YARN_ROPE, "truncate": False},
    ),
    # multi-head latent attention
    "deepseek_v2_dense": family(
        "deepseek_v2", num_experts_per_tok=2, **LATENT, first_k_dense_replace=4, rope_parameters=LATENT_YARN
    ),
    "deepseek_v2_no_query_rank": family(
        "deepseek_v2", num_experts_per_tok=2, **LATENT | dict(q_lora_rank=None), first_k_dense_replace=4
    ),
    "deepseek_v3_dense": family("deepseek_v3", **LATENT, first_k_dense_replace=4, rope_parameters=LATENT_YARN),
    "deepseek_v3_halves": family(
        "deepseek_v3", **LATENT, first_k_dense_replace=4, attention_bias=True, rope_interleave=False
    ),
    "glm4_moe_lite_dense": family(
        "glm4_moe_lite", **LATENT, mlp_layer_types=["dense"] * 4, rope_parameters=rope(partial_rotary_factor=1.0)
    ),
    "mistral4_dense": family(
        "mistral4",
        **LATENT,
        first_k_dense_replace=4,
        rope_parameters={**LATENT_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
    ),
    # and experts
    "deepseek_v2": family(
        "deepseek_v2",
        **LATENT,
        **DEEPSEEK | dict(norm_topk_prob=False),
        topk_method="group_limited_greedy",
        rope_parameters=LATENT_YARN,
    ),
    "deepseek_v2_lite": family(
        "deepseek_v2", **LATENT | dict(q_lora_rank=None), **DEEPSEEK | dict(norm_topk_prob=False), topk_method="greedy"
    ),
    "deepseek_v3": family("deepseek_v3", **LATENT, **DEEPSEEK, rope_parameters=LATENT_YARN),
    "glm4_moe_lite": family(
        "glm4_moe_lite",
        **LATENT,
        **{k: v for k, v in DEEPSEEK.items() if k != "first_k_dense_replace"},
        mlp_layer_types=["dense"] + ["sparse"] * 3,
        rope_parameters=rope(partial_rotary_factor=1.0),
    ),
    "mistral4": family(
        "mistral4",
        **LATENT,
        **DEEPSEEK,
        rope_parameters={**LATENT_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
    ),
    "youtu": family("youtu", **LATENT, attention_bias=True, tie_word_embeddings=True),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The family's model in float32, eval mode, eager attention, all parameters random; same weights for same seed.

    Matrices are 0.2 * normal, so that attention is far from uniform (embeddings 0.05 * normal in the gemmas, which
    multiply them by sqrt(hidden_size) and would otherwise repeat one token for ever). What a family starts at a
    constant (norm weights, biases) is moved by 0.3 * normal from there: norms stay near 1, or near 0 where the
    family computes 1 + w. Per-head and full-width q/k norms get another + 1: sharper attention, livelier sequences.

    Raises:
        KeyError: no family of that name.
    """
    config = FAMILIES[name]()
    # transformers 5.23 leaves Mistral 4 out of its table
    classes = {"mistral4": Mistral4ForCausalLM._from_config}
    make = classes.get(config.model_type, AutoModelForCausalLM.from_config)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # biases of gpt-oss do not start at a constant
        model = make(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "q_norm" in path or "k_norm" in path:
                weight.add_(0.3 * noise + 1)
            elif "norm" in path or weight.ndim == 1:
                weight.add_(0.3 * noise)
            else:
                weight.copy_(0.2 * noise)
        for path, buffer in model.named_buffers():
            if "correction_bias" in path:
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        embedding = model.get_input_embeddings()
        if hasattr(embedding, "embed_scale"):
            embedding.weight.mul_(0.25)
    return model.eval()


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors into `folder`."""
    model.save_pretrained(folder)


def make_legacy(folder: str | Path) -> None:
    """Rewrites `folder`/config.json as transformers 4 wrote it, which is what most checkpoints in the wild carry.

    `rope_parameters` becomes rope_theta, rope_scaling (with the oldest spelling, `type`), partial_rotary_factor and
    rope_local_base_freq. Whoever reads it must arrive at the same model. (`transformers` 5 does too, but for olmo3,
    whose windowed layers then get the default base of 500000 instead of rope_theta.)
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    spelling = "type"
    if "full_attention" in parameters:  # keyed by layer type: gemma3, olmo3; scaling only on the full layers
        if config["model_type"] == "gemma3_text":
            config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters, spelling = parameters["full_attention"], "rope_type"
    config["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {spelling: kind, **parameters}
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config, indent=2))
