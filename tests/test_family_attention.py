"""The attention of gpt-oss and Llama 4 by itself, against the modules of `transformers` with the same weights.

Prompts at once, token by token and in pieces; longer than the window and than the chunk. And the proof that these can fail.

    python -m pytest tests/test_family_attention.py
"""

import dataclasses

import pytest
import torch
import zoo
from test_families import PAGE, TOLERANCE, error
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, Llama4TextRotaryEmbedding

from families import model_config
from model import Attention, ModelConfig, Transformer

LENGTH = 40
GPT_OSS_ROPE = zoo.rope("yarn", factor=8.0, beta_fast=1.0, beta_slow=0.25, truncate=False)
GPT_OSS = zoo.family(
    "gpt_oss",
    head_dim=32,
    num_local_experts=4,
    sliding_window=zoo.WINDOW,
    rope_parameters={**GPT_OSS_ROPE, "original_max_position_embeddings": 32},
)
LLAMA4_KNOBS = dict(
    head_dim=32,
    num_local_experts=4,
    attention_chunk_size=12,
    floor_scale=8,
    attn_scale=0.4,
    rope_parameters=zoo.LLAMA3_ROPE,
)
LLAMA4 = zoo.family("llama4_text", **LLAMA4_KNOBS)
LLAMA4_BIAS = zoo.family(
    "llama4_text", **LLAMA4_KNOBS | dict(use_qk_norm=False, attn_temperature_tuning=False, attention_bias=True)
)
MODULES = {
    "gpt_oss": (GPT_OSS, GptOssAttention, GptOssRotaryEmbedding),
    "llama4": (LLAMA4, Llama4TextAttention, Llama4TextRotaryEmbedding),
    "llama4 without norm and temperature": (LLAMA4_BIAS, Llama4TextAttention, Llama4TextRotaryEmbedding),
}
CASES = [(name, layer) for name in MODULES for layer in (0, 1, 3)]


def settings(name: str) -> PretrainedConfig:
    found = MODULES[name][0]()
    found._attn_implementation = "eager"
    return found


def theirs(name: str, layer: int) -> torch.nn.Module:
    torch.manual_seed(layer)
    module = MODULES[name][1](settings(name), layer)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def mask(c: PretrainedConfig, layer: int) -> Tensor:
    """[1, 1, LENGTH, LENGTH]: who sees whom, by the name of the layer's type."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    sees = {
        "full_attention": lambda: key <= query,
        "sliding_attention": lambda: (key <= query) & (query - key < c.sliding_window),
        "chunked_attention": lambda: (
            (key <= query) & (query // c.attention_chunk_size == key // c.attention_chunk_size)
        ),
    }[c.layer_types[layer]]()
    return torch.zeros(LENGTH, LENGTH).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


@torch.no_grad()
def their_output(name: str, layer: int, x: Tensor) -> Tensor:
    c = settings(name)
    positions = MODULES[name][2](c)(x, torch.arange(LENGTH)[None])
    return theirs(name, layer)(x[None], position_embeddings=positions, attention_mask=mask(c, layer))[0][0]


def our_model(name: str, layer: int, config: ModelConfig) -> Transformer:
    """With the weights of that layer's attention, and nothing else that is ever looked at."""
    model = Transformer(config)
    module, attn = theirs(name, layer), model.blocks[layer].attn
    weights = module.state_dict()
    attn.qkv.weight.data = torch.cat([weights[f"{x}_proj.weight"] for x in "qkv"])
    attn.out.weight.data = weights["o_proj.weight"]
    if attn.qkv.bias is not None:
        attn.qkv.bias.data = torch.cat([weights[f"{x}_proj.bias"] for x in "qkv"])
        attn.out.bias.data = weights["o_proj.bias"]
    if attn.sinks is not None:
        attn.sinks.data = weights["sinks"]
    return model


@torch.inference_mode()
def our_output(model: Transformer, attn: Attention, x: Tensor, pieces: list[int], backend: str) -> Tensor:
    """x [LENGTH, hidden] in pieces of these lengths, over shuffled pages."""
    c, pages = model.config, -(-LENGTH // PAGE)
    kv = tuple(torch.zeros((pages + 1) * PAGE, c.num_kv_heads, c.head_dim) for _ in range(2))
    table = 1 + torch.randperm(pages)[None]
    out, start = [], 0
    for size in pieces:
        step = model.step_context(model.lay_out([start], [size], table, PAGE, backend))
        out.append(attn(x[start : start + size], kv, step))
        start += size
    return torch.cat(out)


def difference(name: str, layer: int, pieces: list[int], backend: str = "sdpa", wrong: dict | None = None) -> float:
    x = torch.randn(LENGTH, zoo.TINY["hidden_size"], generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(model_config(settings(name).to_dict()), **wrong or {})
    model = our_model(name, layer, config)
    return error(our_output(model, model.blocks[layer].attn, x, pieces, backend), their_output(name, layer, x))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name, layer", CASES)
def test_attention(name: str, layer: int, backend: str):
    for pieces in ([LENGTH], [1] * LENGTH, [17, LENGTH - 20, 3]):
        assert difference(name, layer, pieces, backend) < TOLERANCE, pieces


@torch.inference_mode()
def our_decodes(model: Transformer, attn: Attention, x: Tensor, decode) -> Tensor:
    """x token by token, as a compiled decode does it."""
    c, pages = model.config, -(-LENGTH // PAGE)
    kv = tuple(torch.zeros((pages + 1) * PAGE, c.num_kv_heads, c.head_dim) for _ in range(2))
    table = 1 + torch.randperm(pages)[None]
    return torch.cat([decode(model, attn, x[i : i + 1], kv, torch.tensor([i]), table) for i in range(len(x))])


def decode_step(
    model: Transformer, attn: Attention, x: Tensor, kv: tuple[Tensor, Tensor], positions: Tensor, table: Tensor
) -> Tensor:
    return attn(x, kv, model.step_context(model.lay_out_decode(positions, table, PAGE)))


@pytest.mark.parametrize("name, layer", [("gpt_oss", 0), ("llama4", 0), ("llama4", 3)])
def test_a_compiled_decode(name: str, layer: int):
    """As one graph, in the loops of `kernels/decode_loops.py`."""
    torch._dynamo.reset()
    model = our_model(name, layer, model_config(settings(name).to_dict()))
    x = torch.randn(LENGTH, zoo.TINY["hidden_size"])
    out = our_decodes(model, model.blocks[layer].attn, x, torch.compile(decode_step, fullgraph=True))
    assert error(out, their_output(name, layer, x)) < TOLERANCE


WRONG = {
    "no sinks": ("gpt_oss", 1, dict(sinks=False)),
    "no window": ("gpt_oss", 0, dict(windows=[])),
    "window on the other layers": ("gpt_oss", 1, dict(windows=[None, zoo.WINDOW] * 2)),
    "yarn truncated": (
        "gpt_oss",
        1,
        dict(ropes=model_config(zoo.family("gpt_oss", rope_parameters=zoo.YARN_ROPE, head_dim=32)().to_dict()).ropes),
    ),
    "no chunks": ("llama4", 0, dict(chunks=[])),
    "a window in place of chunks": ("llama4", 0, dict(chunks=[], windows=[12] * 4)),
    "chunks too long by one": ("llama4", 0, dict(chunks=[13] * 4)),
    "chunks everywhere": ("llama4", 3, dict(chunks=[12] * 4)),
    "no norm of q and k": ("llama4", 0, dict(qk_norm="off")),
    "rope in halves": ("llama4", 0, dict(rope_interleaved=False)),
    "rope on all layers": ("llama4", 3, dict(layer_rope=[])),
    "no temperature": ("llama4", 3, dict(query_temperature=None)),
    "temperature from 0": ("llama4", 3, dict(query_temperature_from=0)),
    "temperature everywhere": ("llama4", 0, dict(query_temperature_without_rope=False)),
}


@pytest.mark.parametrize("knob", WRONG)
def test_a_wrong_knob_is_seen(knob: str):
    name, layer, change = WRONG[knob]
    assert difference(name, layer, [LENGTH], wrong=change) > 10 * TOLERANCE


def test_a_layer_with_a_window_and_chunks_is_refused():
    config = dataclasses.replace(model_config(LLAMA4().to_dict()), windows=[3] * 4)
    with pytest.raises(ValueError, match=r"both a window \(3\) and chunks \(12\)"):
        Transformer(config)
