"""Weights in 8 and 4 bits against loops in float64 and against `transformers`; whole checkpoints; what is refused.

python -m pytest tests/test_quantized.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import copy_of, open_and_load, refusal, rewrite
from test_families import TOLERANCE, error, our_logits, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from checkpoint import Checkpoint, save
from errors import UserError
from quantized import PIECE, Fp8, expand_mxfp4, quantization

FP8 = torch.float8_e4m3fn
BLOCK = (24, 40)  # neither divides 64 nor 96


def random_fp8(rows: int, columns: int, block: tuple[int, int]) -> Fp8:
    grid = [-(-size // b) for size, b in zip((rows, columns), block, strict=True)]
    return Fp8(torch.randn(rows, columns).to(FP8), torch.rand(grid) + 0.1, block)


def random_mxfp4(experts: int, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    """Blocks of any bytes, and scales from 2^-7 to 2^8."""
    blocks = torch.randint(256, (experts, rows, groups, 16), dtype=torch.uint8)
    return blocks, torch.randint(120, 136, (experts, rows, groups), dtype=torch.uint8)


# ---- the numbers


@pytest.mark.parametrize("block", [(128, 128), (24, 40), (1, 7), (200, 300)], ids=str)
def test_fp8_against_a_loop(block: tuple[int, int]):
    torch.manual_seed(0)
    weight = random_fp8(50, 90, block)
    out = torch.empty(weight.shape)
    weight.copy_to(out)
    for i in range(50):
        for j in range(90):
            scale = float(weight.scales[i // block[0], j // block[1]])
            assert float(out[i, j]) == pytest.approx(float(weight.weight[i, j].float()) * scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_as_transformers_does_it(dtype: torch.dtype):
    """At the size of block that is published, the last blocks partial, scales of either dtype."""
    for scales in (torch.float32, torch.bfloat16):
        weight = random_fp8(300, 200, (128, 128))
        weight.scales = weight.scales.to(scales)
        out = torch.empty(weight.shape, dtype=dtype)
        weight.copy_to(out)
        exact = _dequantize_fp8_weight(weight.weight, weight.scales, [128, 128], torch.float32)
        torch.testing.assert_close(out, exact.to(dtype), rtol=0, atol=0)


def test_mxfp4_against_a_loop():
    torch.manual_seed(0)
    blocks, scales = random_mxfp4(2, 5, 3)
    out = expand_mxfp4(blocks, scales, torch.float64)
    assert out.shape == (2, 96, 5) and out.dtype == torch.float64
    for e in range(2):
        for row in range(5):
            for column in range(96):
                byte = int(blocks[e, row, column // 32, column % 32 // 2])
                nibble = byte >> 4 if column % 2 else byte & 15
                power = int(scales[e, row, column // 32]) - 127
                assert float(out[e, column, row]) == FP4_VALUES[nibble] * 2.0**power


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_as_transformers_does_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("quantized.PIECE", 32 * 2 * 7)  # 7 rows at a time, which do not divide 40
    blocks, scales = random_mxfp4(3, 40, 2)
    out = expand_mxfp4(blocks, scales, dtype)
    assert out.dtype == dtype and out.equal(convert_moe_packed_tensors(blocks, scales, dtype=dtype))


class Largest(TorchDispatchMode):
    """The most numbers of float32 that any one operation made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and not func.is_view:
            self.made = max(self.made, out.numel())
        return out


def test_a_piece_at_a_time():
    fp8, out = random_fp8(4096, 512, (128, 128)), torch.empty(4096, 512, dtype=torch.bfloat16)
    with Largest() as largest:
        fp8.copy_to(out)
    assert 0 < largest.made <= 128 * 512
    with Largest() as largest:
        out = expand_mxfp4(*random_mxfp4(4, 512, 32), torch.bfloat16)
    assert 0 < largest.made <= PIECE < out.numel()


# ---- checkpoints


def quantise(path: Path, block: tuple[int, int] = BLOCK) -> dict[str, Tensor]:
    """Make every linear weight of a checkpoint fp8, as DeepSeek-V3 is. -> what the tensors now stand for."""
    exact: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            weight = random_fp8(*tensors[name].shape, block)
            wide = weight.scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            weight.weight = (tensors[name] / wide[: len(tensors[name]), : tensors[name].shape[1]]).to(FP8)
            tensors[name], tensors[f"{name}_scale_inv"] = weight.weight, weight.scales
            exact[name] = torch.empty(weight.shape)
            weight.copy_to(exact[name])

    rewrite(path, change)
    change_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"})
    return exact


def change_config(path: Path, **changes) -> None:
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("name", ["llama2", "phi3"])
def test_an_fp8_checkpoint(name: str, tmp_path: Path):
    """The same logits as `transformers` gets from the numbers that it stands for; and `save` stores those."""
    path = copy_of(name, tmp_path)
    plain = load_file(path / "model.safetensors")
    exact = quantise(path)
    assert all(0 < error(exact[n], plain[n]) < 0.1 for n in exact) and len(exact) >= 4 * 4
    model = open_and_load(path)
    saved = tmp_path / "plain"
    save(model, Checkpoint.open(path).raw_config, saved)
    assert all(load_file(saved / "model.safetensors")[n].equal(exact[n]) for n in exact)
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    ids, unquantised = reference(name)
    with torch.no_grad():
        expected = theirs.eval()(ids[None]).logits[0]
    ours = our_logits(model, ids, [len(ids)])
    assert error(ours, expected) < TOLERANCE < error(ours, unquantised)


def test_an_fp8_checkpoint_in_bfloat16(tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    exact = quantise(path)
    model = open_and_load(path, torch.bfloat16)
    model.unpack()
    name = "model.layers.2.self_attn.o_proj.weight"
    assert model.blocks[2].attn.out.weight.equal(exact[name].bfloat16())


def gpt_oss(path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    raw = {"model_type": "gpt_oss", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32}
    raw |= {"num_local_experts": 3, "num_experts_per_tok": 2, "quantization_config": {"quant_method": "mxfp4"}}
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def test_experts_in_mxfp4(tmp_path: Path):
    """Blocks and scales are one weight, of the name and the shape that it has in a checkpoint that is not quantised."""
    blocks, scales = random_mxfp4(3, 64, 2)
    bias = torch.randn(3, 64)
    tensors = {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales, f"{EXPERTS}_bias": bias}
    checkpoint = gpt_oss(tmp_path, tensors)
    assert {n: s.shape for n, s in checkpoint.sources.items()} == {EXPERTS: (3, 64, 64), f"{EXPERTS}_bias": (3, 64)}
    read, read_bias = checkpoint.read([EXPERTS, f"{EXPERTS}_bias"], torch.float32)
    assert read.equal(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)) and read_bias.equal(bias)


@torch.no_grad()
def assert_same_as_transformers(path: Path, plain: Path) -> None:
    """Our logits of the one are theirs of the other."""
    ids = torch.arange(3, 43)
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()(ids[None]).logits[0]
    assert error(our_logits(open_and_load(path), ids, [17, 20, 3]), theirs) < TOLERANCE


def test_the_whole_of_gpt_oss_in_mxfp4(tmp_path: Path):
    path, plain = copy_of("gpt_oss", tmp_path), copy_of("gpt_oss", tmp_path / "plain")
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if name.endswith("_proj") and ".experts." in name:
            blocks, scales = random_mxfp4(weight.shape[0], weight.shape[2], weight.shape[1] // 32)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales // 16 + 116}  # 2^-4 and 2^-3
            dense[name] = convert_moe_packed_tensors(blocks, packed[f"{name}_scales"], dtype=torch.float32)
    assert len(dense) == 2 * 4
    rewrite(path, lambda t: [t.pop(name) for name in dense] and t.update(packed))
    rewrite(plain, lambda t: t.update({name: weight.contiguous() for name, weight in dense.items()}))
    change_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert_same_as_transformers(path, plain)


def test_the_whole_of_deepseek_v3_in_fp8(tmp_path: Path):
    """Latents, experts and all; and a layer behind the last that predicts, in fp8 too."""
    path, plain = copy_of("deepseek_v3", tmp_path), copy_of("deepseek_v3", tmp_path / "plain")
    names = load_file(path / "model.safetensors").keys()
    ahead = {name.replace("layers.3", "layers.4"): name for name in names if "layers.3." in name}
    rewrite(path, lambda t: t.update({name: t[like].clone() for name, like in ahead.items()}))
    exact = quantise(path)
    change_config(path, num_nextn_predict_layers=1)
    assert any(".experts.7.down_proj" in n for n in exact) and any("kv_b_proj" in n for n in exact)
    rewrite(plain, lambda t: t.update({name: weight for name, weight in exact.items() if name not in ahead}))
    assert_same_as_transformers(path, plain)


# ---- what is refused


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quantization_config.quant_method 'gptq' is not supported; these are: fp8, mxfp4",
        ),
        ({"bits": 4}, "quantization_config.quant_method None is not supported"),
        ("awq", "quantization_config.quant_method 'awq' is not supported"),
        ({"quant_method": "fp8"}, "quantization_config.weight_block_size must be two positive integers, not None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size must be .* not \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size must be .* not \[128, 0\]"),
        ({"quant_method": "fp8", "weight_block_size": [True, 1]}, r"weight_block_size must be .* not \[True, 1\]"),
    ],
    ids=str,
)
def test_other_methods_are_refused(settings, message: str):
    with pytest.raises(UserError, match=message):
        quantization({"quantization_config": settings})


def test_a_config_that_says_nothing_of_it():
    assert quantization({}) is None and quantization({"quantization_config": None}) is None


NAME = "model.layers.1.self_attn.k_proj.weight"
SCALES = f"{NAME}_scale_inv"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(SCALES), f"{NAME} is quantised, and its scales {SCALES} are missing"),
        (lambda t: t.update({SCALES: torch.ones(3, 3)}), f"{SCALES} is F32 [3, 3]; {NAME} [64, 64] needs F32 or"),
        (lambda t: t.update({SCALES: torch.ones(3, 2).int()}), f"{SCALES} is I32 [3, 2]; {NAME} [64, 64] needs F32 or"),
        (lambda t: t.update({SCALES: torch.tensor(1.0)}), f"{SCALES} is F32 []; {NAME} [64, 64] needs F32 or"),
        (lambda t: t.update({NAME: torch.ones(2, 32, 64).to(FP8)}), f"{NAME} is stored in 8 bits and has 3 dimensions"),
        (lambda t: t.update({NAME: torch.ones(64, 64)}), f"has unknown 1 tensor: {SCALES}"),
    ],
)
def test_fp8_that_does_not_fit_together(change, message: str, tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    quantise(path)
    rewrite(path, change)
    assert message in refusal(path)


@pytest.mark.parametrize("settings", [None, {"quant_method": "mxfp4"}], ids=str)
def test_fp8_of_which_the_config_says_nothing(settings, tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    quantise(path)
    change_config(path, quantization_config=settings)
    assert "_proj.weight is stored in 8 bits (float8_e4m3fn), of which config.json says nothing" in refusal(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scales=None), "_blocks is quantised, and its scales .*_scales are missing"),
        (dict(scales=torch.ones(3, 64, 1).byte()), r"_scales is U8 \[3, 64, 1\]; .* needs U8 \[3, 64, 2\]"),
        (dict(scales=torch.ones(3, 64, 2)), r"_scales is F32 \[3, 64, 2\]; .* needs U8 \[3, 64, 2\]"),
        (dict(blocks=torch.ones(3, 64, 2, 8).byte()), r"_blocks is U8 \[3, 64, 2, 8\]; blocks of mxfp4 are"),
        (dict(blocks=torch.ones(3, 64, 2, 16)), r"_blocks is F32 \[3, 64, 2, 16\]; blocks of mxfp4 are"),
    ],
    ids=range(5),
)
def test_mxfp4_that_does_not_fit_together(change: dict, message: str, tmp_path: Path):
    parts = dict(zip(("blocks", "scales"), random_mxfp4(3, 64, 2), strict=True)) | change
    tensors = {f"{EXPERTS}_{kind}": t for kind, t in parts.items() if t is not None}
    with pytest.raises(UserError, match=message):
        _ = gpt_oss(tmp_path, tensors).sources


# ---- layers that predict tokens ahead


def with_layers(path: Path, *layers: int) -> Path:
    names = ("embed_tokens.weight", "enorm.weight", "eh_proj.weight", "self_attn.q_proj.weight")
    rewrite(path, lambda t: t.update({f"model.layers.{i}.{n}": torch.ones(2, 2) for i in layers for n in names}))
    return path


def test_prediction_layers_are_left_aside_with_a_note(tmp_path: Path):
    path = with_layers(copy_of("llama2", tmp_path), 4)
    change_config(path, num_nextn_predict_layers=1)
    assert Checkpoint.open(path).notes == ["left aside: model.layers.4 (for predicting tokens ahead)"]
    ids, theirs = reference("llama2")
    assert error(our_logits(open_and_load(path), ids, [len(ids)]), theirs) < TOLERANCE
    with_layers(path, 5)
    assert "has unknown 4 tensors: model.layers.5.e" in refusal(path)
    change_config(path, num_nextn_predict_layers=2)
    assert Checkpoint.open(path).notes == ["left aside: model.layers.4, model.layers.5 (for predicting tokens ahead)"]
    change_config(path, num_nextn_predict_layers=0)
    assert "has unknown 8 tensors: model.layers.4" in refusal(path)
    change_config(path, num_nextn_predict_layers="one")
    assert "num_nextn_predict_layers must be an integer, not 'one'" in refusal(path)


def test_no_note_without_such_layers(tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    change_config(path, num_nextn_predict_layers=1)
    assert Checkpoint.open(path).notes == []
