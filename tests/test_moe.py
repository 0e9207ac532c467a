"""Routing against the rules written out one token at a time; what is stored, packed and refused.

Parity of whole models with `transformers` is in `test_families.py`.

pytest tests/test_moe.py
"""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import TOLERANCE, error, folder, our_logits, our_model, reference
from torch import nn

from checkpoint import Checkpoint, _plain_weights, load, save
from errors import UserError
from families import GPT_OSS_NAMES, LLAMA4_NAMES, MoENames, model_config
from kernels import linear
from kernels.linear import can_pack
from moe import ROUTINGS, Experts, MoE, MoESpec
from tensor_names import as_ours, as_theirs

E, K = 12, 3


def spec_of(**knobs) -> MoESpec:
    return MoESpec(**dict(num_experts=E, top_k=K, intermediate_size=8, layers=(True,)) | knobs)


# ---- routing


def by_hand(logits: list[float], spec: MoESpec, correction: list[float]) -> dict[int, float]:
    """-> {expert: weight} of one token, in Python's own float64."""
    x = torch.tensor(logits, dtype=torch.float64)
    if spec.routing == "softmax":
        scores = (x.exp() / x.exp().sum()).tolist()
    elif spec.routing == "sigmoid":
        scores = (1 / (1 + (-x).exp())).tolist()
    else:
        scores = logits
    chooses = [s + c for s, c in zip(scores, correction, strict=True)]
    size = len(chooses) // spec.groups
    worth = {}
    for g in range(spec.groups):
        members = sorted(chooses[g * size : (g + 1) * size], reverse=True)
        worth[g] = members[0] if spec.group_score == "max" else sum(members[:2])
    groups = sorted(worth, key=worth.get, reverse=True)[: spec.topk_groups]
    allowed = [e for e in range(len(chooses)) if e // size in groups]
    chosen = sorted(allowed, key=lambda e: chooses[e], reverse=True)[: spec.top_k]
    if spec.routing == "top_k_softmax":
        total = sum(x[e].exp() for e in chosen)
        weights = {e: (x[e].exp() / total).item() for e in chosen}
    elif spec.routing == "top_k_sigmoid":
        weights = {e: (1 / (1 + (-x[e]).exp())).item() for e in chosen}
    else:
        weights = {e: scores[e] for e in chosen}
    total = sum(weights.values()) if spec.renormalize else 1.0
    return {e: w / total * spec.scale for e, w in weights.items()}


ROUTES = {
    "softmax": dict(),
    "Mixtral": dict(renormalize=True),
    "DeepSeek-V2": dict(groups=4, topk_groups=2, scale=16.0),
    "Mistral 4": dict(groups=3, topk_groups=2, group_score="top2", renormalize=True),
    "Granite, gpt-oss": dict(routing="top_k_softmax"),
    "Llama 4": dict(routing="top_k_sigmoid", top_k=1),
    "MiniMax M2": dict(routing="sigmoid", renormalize=True, correction_bias=True),
    "DeepSeek-V3": dict(
        routing="sigmoid",
        renormalize=True,
        correction_bias=True,
        groups=4,
        topk_groups=2,
        group_score="top2",
        scale=2.5,
    ),
    "one group of one": dict(routing="sigmoid", groups=12, topk_groups=4, correction_bias=True),
    "all experts": dict(top_k=E),
}


@pytest.mark.parametrize("name", ROUTES)
def test_routing(name: str):
    spec = spec_of(**ROUTES[name])
    generator = torch.Generator().manual_seed(len(name))
    logits = 2 * torch.randn(200, E, generator=generator)
    correction = torch.randn(E, generator=generator) * 0.3 if spec.correction_bias else None
    chosen, weights = ROUTINGS[spec.routing](logits, spec, correction)
    assert chosen.shape == weights.shape == (200, spec.top_k) and weights.dtype == torch.float32
    for row in range(200):
        expected = by_hand(logits[row].tolist(), spec, [0.0] * E if correction is None else correction.tolist())
        found = dict(zip(chosen[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


def test_saturated_sigmoids_do_not_choose():
    """Llama 4 chooses by the logits: in float32 the sigmoid of 20 is that of 30."""
    chosen, weights = ROUTINGS["top_k_sigmoid"](torch.tensor([[20.0, 30.0]]), spec_of(num_experts=2, top_k=1), None)
    assert chosen.tolist() == [[1]] and weights.tolist() == [[1.0]]


def test_scores_are_float32_whatever_the_model_is_in():
    """Two experts that bfloat16 cannot tell apart."""
    layer = MoE(64, spec_of(num_experts=2, top_k=1), "silu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        layer.router.weight[0] = 1.0
        layer.router.weight[1] = 1.0
        layer.router.weight[1, 5] += 1e-4
        chosen, weights = layer.router(torch.ones(3, 64, dtype=torch.bfloat16))
    assert chosen.tolist() == [[1]] * 3 and weights.dtype == torch.float32


# ---- the layer


@pytest.fixture
def small_experts_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WORTH_A_CALL", 1)


def test_bytes_of_one_token_and_packing(small_experts_are_packed):
    """Of the experts k in E, of all else everything but the embedding; packed or not."""
    model = our_model(folder("qwen2_moe"))
    spec = model.config.moe
    assert spec.layers == (False, True, False, True)
    expert = 3 * spec.intermediate_size * model.config.hidden_size
    everything = sum(p.numel() for _, p in _plain_weights(model)) - model.embed.weight.numel()
    idle = sum(spec.layers) * (spec.num_experts - spec.top_k) * expert
    ids, theirs = reference("qwen2_moe")
    for layout in (model.unpack, model.pack, model.unpack):
        layout()
        assert model.weight_bytes_per_token() == 4 * (everything - idle)
        assert error(our_logits(model, ids, [len(ids)]), theirs) < TOLERANCE


def test_small_experts_stay_as_they_are():
    layers = [m for m in our_model(folder("mixtral")).modules() if isinstance(m, Experts)]
    assert not any(layer.packed for layer in layers) and layers[0].gate_up.shape == (5, 192, 64)


def test_weights_of_experts_are_packed_one_by_one(small_experts_are_packed):
    model = our_model(folder("mixtral"))
    layers = [m for m in model.modules() if isinstance(m, Experts)]
    assert len(layers) == 4
    for layer in layers:
        if can_pack(torch.empty(1)):
            assert layer.gate_up is None and layer.down is None
            assert [len(packed) for packed in layer.packed.values()] == [5, 5]
            assert all(w.is_mkldnn for packed in layer.packed.values() for w in packed)


def test_the_router_keeps_float32_in_a_bfloat16_model(tmp_path: Path, small_experts_are_packed):
    checkpoint = Checkpoint.open(folder("dots1"))
    model = load(checkpoint, torch.bfloat16, torch.device("cpu"))
    stored = load_file(folder("dots1") / "model.safetensors")
    router = model.blocks[2].mlp.router
    assert router.weight.equal(stored["model.layers.2.mlp.gate.weight"])
    assert router.correction_bias.equal(stored["model.layers.2.mlp.gate.e_score_correction_bias"])
    assert {w.dtype for packed in model.blocks[2].mlp.experts.packed.values() for w in packed} <= {torch.bfloat16}
    save(model, checkpoint.raw_config, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert written["model.layers.2.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "key, shape", [("gate_up", (3, 8, 5)), ("gate_up_bias", (3, 8)), ("down", (3, 5, 4)), ("down_bias", (3, 5))]
)
@pytest.mark.parametrize("names", [MoENames(), GPT_OSS_NAMES, LLAMA4_NAMES], ids=["plain", "gpt-oss", "llama 4"])
def test_layouts_of_stacked_experts(names: MoENames, key: str, shape: tuple):
    """There and back; and where channel 1 of the gates, and of the ups, of expert 2 lies."""
    ours = torch.arange(math.prod(shape)).view(shape)
    theirs = as_theirs(ours, key, names)
    assert as_ours(theirs, key, names).reshape(shape).equal(ours)
    turned = names.transposed and len(shape) == 3
    assert theirs.shape == ((3, shape[2], shape[1]) if turned else shape)
    if key.startswith("gate_up"):
        gate, up = (2, 3) if names.interleaved else (1, 5)
        for at, row in ((gate, 1), (up, 5)):
            assert (theirs[2, :, at] if turned else theirs[2, at]).equal(ours[2, row])


# ---- configs that make no sense

BAD = {
    "num_experts_per_tok is 9: must be from 1 to the 8 experts": ("glm4_moe", dict(num_experts_per_tok=9)),
    "num_experts_per_tok is 0": ("mixtral", dict(num_experts_per_tok=0)),
    "n_group is 3: it must divide the 8 experts": ("glm4_moe", dict(n_group=3)),
    "topk_group is 5: must be from 1 to n_group, which is 4": ("dots1", dict(topk_group=5)),
    "num_experts_per_tok is 3, and the topk_group best groups have 2": ("dots1", dict(topk_group=1)),
    "n_group is 8: groups that are scored by their two best": ("glm4_moe", dict(n_group=8, topk_group=4)),
    "scoring_func 'softmax' of a glm4_moe model is not supported": ("glm4_moe", dict(scoring_func="softmax")),
    "scoring_func 'tanh' of a minimax_m2 model": ("minimax_m2", dict(scoring_func="tanh")),
    "topk_method 'greedy' of a dots1 model": ("dots1", dict(topk_method="greedy")),
    "clip_qkv is 8.0": ("olmoe", dict(clip_qkv=8.0)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs_are_refused_by_the_name_of_the_field(message: str):
    name, knobs = BAD[message]
    raw = Checkpoint.open(folder(name)).raw_config
    with pytest.raises(UserError, match=re.escape(message)):
        model_config(raw | knobs)


@pytest.mark.parametrize("knobs", [dict(routing="lottery"), dict(group_score="median")], ids=str)
def test_ways_that_do_not_exist(knobs: dict):
    with pytest.raises(UserError, match="is not supported; these are: "):
        spec_of(**knobs)


def test_an_expert_that_is_missing(tmp_path: Path):
    """And one of another size than the config says."""
    tensors = load_file(folder("mixtral") / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    shutil.copytree(folder("mixtral"), tmp_path, dirs_exist_ok=True)
    for change, message in ((None, "is missing 1 tensor: "), (torch.zeros(95, 64), "has mis-shaped 1 tensor: ")):
        changed = {n: t for n, t in tensors.items() if n != name} | ({} if change is None else {name: change})
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message + re.escape(name)):
            our_model(tmp_path)
