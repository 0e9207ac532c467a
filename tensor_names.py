"""Which tensors of a checkpoint each of our parameters is made of, and how they lie in it.

A checkpoint has q, k and v, gate and up, and mostly every expert, as tensors of their own; here they are one. `tensor_names`
says which become which, `in_parts` takes a parameter apart again. What differs between families, `families.py` says.

    python -m pytest tests/test_checkpoint.py tests/test_moe.py
"""

from collections.abc import Sequence

from torch import Tensor

from families import Family, MoENames
from model import ModelConfig


def tensor_names(config: ModelConfig, family: Family) -> dict[str, list[str]]:
    """Our parameter -> the checkpoint's tensors that make it up, in the order in which they are stacked."""
    names = {
        "embed.weight": ["model.embed_tokens.weight"],
        "norm.weight": ["model.norm.weight"],
        "head.weight": ["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"],
    }
    linears = {
        **_latent_linears(config),
        "attn.qkv": ["self_attn.qkv_proj"] if "qkv" in family.fused else [f"self_attn.{x}_proj" for x in "qkv"],
        "attn.out": ["self_attn.o_proj"],
    }
    norms = dict(family.norms)
    for ours, theirs in zip(("q_norm", "k_norm"), family.qk_norm_names, strict=True):
        norms[f"attn.{ours}"] = f"self_attn.{theirs}"
    if config.latent is not None:
        norms |= {"attn.q_norm": "self_attn.q_a_layernorm", "attn.kv_norm": "self_attn.kv_a_layernorm"}
    for i in range(config.num_layers):
        has_experts = config.moe is not None and config.moe.layers[i]
        mlp = _expert_linears(family) if has_experts else _mlp_linears(family)
        for ours, theirs in (linears | mlp).items():
            for key in ("weight", "bias"):
                names[f"blocks.{i}.{ours}.{key}"] = [f"model.layers.{i}.{t}.{key}" for t in theirs]
        for ours, theirs in norms.items():
            names[f"blocks.{i}.{ours}.weight"] = [f"model.layers.{i}.{theirs}.weight"]
        names[f"blocks.{i}.attn.sinks"] = [f"model.layers.{i}.self_attn.sinks"]
        if has_experts:
            for ours, theirs in _expert_tensors(family.moe, config.moe.num_experts).items():
                names[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{t}" for t in theirs]
        names[f"blocks.{i}.attn.kv_up"] = [f"model.layers.{i}.self_attn.kv_b_proj.weight"]
    return names


def _latent_linears(config: ModelConfig) -> dict[str, list[str]]:
    """Those of MLA, whose `kv_up` is no linear layer."""
    if config.latent is None:
        return {}
    q_up = "self_attn.q_b_proj" if config.latent.query_rank else "self_attn.q_proj"
    downs = {"attn.q_down": ["self_attn.q_a_proj"], "attn.kv_down": ["self_attn.kv_a_proj_with_mqa"]}
    return {**downs, "attn.q_up": [q_up]}


def _mlp_linears(family: Family) -> dict[str, list[str]]:
    parts = ["gate_up_proj"] if "gate_up" in family.fused else ["gate_proj", "up_proj"]
    return {"mlp.gate_up": [f"{family.mlp}.{p}" for p in parts], "mlp.down": [f"{family.mlp}.down_proj"]}


def _expert_linears(family: Family) -> dict[str, list[str]]:
    gate_up, down = family.moe.shared
    router, shared_gate = [family.moe.router], [family.moe.shared_gate]
    return {
        "mlp.router": router,
        "mlp.shared.gate_up": gate_up,
        "mlp.shared.down": down,
        "mlp.shared_gate": shared_gate,
    }


def _expert_tensors(names: MoENames, num_experts: int) -> dict[str, list[str]]:
    """One tensor of all experts, or those of the first, those of the second ..."""
    stacked = "{}" not in names.down
    experts = [0] if stacked else range(num_experts)
    return {
        "mlp.router.correction_bias": [names.correction_bias],
        "mlp.experts.gate_up": [name.format(e) for e in experts for name in names.gate_up],
        "mlp.experts.down": [names.down.format(e) for e in experts],
        "mlp.experts.gate_up_bias": [f"{name}_bias" for name in names.gate_up],
        "mlp.experts.down_bias": [f"{names.down}_bias"],
    }


def in_parts(weight: Tensor, name: str, parts: int, config: ModelConfig, family: Family) -> Sequence[Tensor]:
    """Our weight -> the `parts` tensors that it is made of in the checkpoint."""
    if ".experts." in name:
        if parts == 1:
            return [as_theirs(weight, name.rsplit(".", 1)[1], family.moe)]
        weight = weight.flatten(0, 1)
    if ".qkv." in name and parts == 3:
        return weight.split([n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)])
    return weight.split(weight.shape[0] // parts)


def as_ours(weight: Tensor, key: str, names: MoENames) -> Tensor:
    """A stacked weight or bias of experts as a checkpoint has it -> with the numbers in our order, as a view."""
    if names.transposed and weight.dim() == 3:
        weight = weight.transpose(1, 2)
    if names.interleaved and key.startswith("gate_up"):
        weight = weight.unflatten(1, (-1, 2)).transpose(1, 2)  # [E, 2, I, ...]
    return weight


def as_theirs(weight: Tensor, key: str, names: MoENames) -> Tensor:
    """The way back: gate_up [E, 2I, hidden], down [E, hidden, I] or a bias [E, ...] -> the checkpoint's layout."""
    if names.interleaved and key.startswith("gate_up"):
        weight = weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return weight.transpose(1, 2) if names.transposed and weight.dim() == 3 else weight
