"""Every family against `transformers`, on tiny random checkpoints that `transformers` itself saves.

float32 logits for a whole prompt, token by token and in left-over chunks; greedy tokens of three prompts in one batch; both
layouts of config.json. And the proof that these can fail: deliberately wrong knobs, each of which must break the logits.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path

import pytest
import torch
import zoo

from checkpoint import Checkpoint, load
from engine import Engine, SamplingParams
from model import ModelConfig, Transformer

PAGE = 4
LENGTH = 40  # longer than the sliding window, and than the short context of longrope
TOLERANCE = 1e-5  # of the largest logit


@functools.cache
def folder(name: str) -> Path:
    path = Path(tempfile.mkdtemp()) / name
    zoo.save(zoo.build(name), path)
    return path


@functools.cache
def reference(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt [LENGTH], and what `transformers` makes of it: logits [LENGTH, V]."""
    ids = torch.randint(zoo.VOCAB, (longest(name),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ids, zoo.build(name)(ids[None]).logits[0]


def longest(name: str) -> int:
    return 60 if "longrope" in name else LENGTH  # past the 48 tokens of its short context


def our_model(path: Path, config: ModelConfig | None = None, max_model_len: int | None = None) -> Transformer:
    checkpoint = Checkpoint.open(path)
    if config is not None:
        checkpoint = dataclasses.replace(checkpoint, config=config)
    return load(checkpoint, torch.float32, torch.device("cpu"), max_model_len)


@torch.inference_mode()
def our_logits(model: Transformer, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """The prompt in chunks of these lengths, over shuffled pages -> logits [len(ids), V]."""
    pages = -(-len(ids) // PAGE)
    kv = model.config.cache.allocate((pages + 1) * PAGE, torch.float32, torch.device("cpu"))
    table = 1 + torch.randperm(pages)[None]
    out, start = [], 0
    for size in chunks:
        layout = model.lay_out([start], [size], table, PAGE)
        out.append(model.logits(model(ids[start : start + size], layout, kv)))
        start += size
    return torch.cat(out)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_logits(name: str):
    ids, theirs = reference(name)
    model = our_model(folder(name))
    n = len(ids)
    for chunks in ([n], [1] * n, [17, n - 20, 3]):
        assert error(our_logits(model, ids, chunks), theirs) < TOLERANCE, chunks


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_greedy_tokens_of_three_prompts_at_once(name: str):
    theirs = zoo.build(name)
    generator = torch.Generator().manual_seed(2)
    lengths = (50, 55, 63) if "longrope" in name else (5, 23, 37)
    prompts = [torch.randint(zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    engine = Engine(our_model(folder(name)), page_size=PAGE, max_batch_size=3)
    ours = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=64))
    for prompt, output in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
    engine.check()


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_old_layout_of_config_json(name: str, tmp_path: Path):
    zoo.save(zoo.build(name), tmp_path)
    new = Checkpoint.open(tmp_path).config
    zoo.make_legacy(tmp_path)
    old = Checkpoint.open(tmp_path).config
    if name == "olmo3":
        pytest.skip("transformers gives its windowed layers the default base; released files carry the default")
    for mine, theirs in zip(old.ropes, new.ropes, strict=True):
        known = {**theirs.scaling, "rope_type": theirs.type}
        assert (mine.theta, mine.dim, mine.type) == (theirs.theta, theirs.dim, theirs.type)
        assert all(mine.scaling.get(k) == v for k, v in known.items() if k != "type")
    assert dataclasses.replace(old, ropes=new.ropes) == new


def test_the_short_context_of_longrope():
    """Served with at most the original context, the short factors hold."""
    ids, _ = reference("phi3_longrope")
    with torch.no_grad():
        theirs = zoo.build("phi3_longrope")(ids[None, :40]).logits[0]
    assert error(our_logits(our_model(folder("phi3_longrope"), max_model_len=48), ids[:40], [40]), theirs) < TOLERANCE


def ropes(c: ModelConfig, **changes) -> dict:
    return {"ropes": [dataclasses.replace(r, **changes) for r in c.ropes]}


def scaled(c: ModelConfig, **changes) -> dict:
    return {"ropes": [dataclasses.replace(r, scaling={**r.scaling, **changes}) for r in c.ropes]}


def experts(c: ModelConfig, **changes) -> dict:
    return {"moe": dataclasses.replace(c.moe, **changes)}


def latent(c: ModelConfig, **changes) -> dict:
    return {"latent": dataclasses.replace(c.latent, **changes)}


WRONG = {
    "norm eps": ("llama2", lambda c: {"norm_eps": 1e-6}),
    "norm offset": ("gemma", lambda c: {"norm_offset": 0.0}),
    "norm without centring": ("cohere", lambda c: {"norm_center": False}),
    "rope interleaved": ("llama3", lambda c: {"rope_interleaved": True}),
    "rope in halves": ("glm", lambda c: {"rope_interleaved": False}),
    "rope theta": ("qwen3", lambda c: ropes(c, theta=1100.0)),
    "rope over all dims": ("glm4", lambda c: ropes(c, dim=c.head_dim)),
    "rope scaling off": ("llama3", lambda c: ropes(c, scaling={})),
    "linear factor": ("llama_linear", lambda c: scaled(c, factor=2.0)),
    "yarn attention factor": ("llama_yarn", lambda c: scaled(c, attention_factor=1.0)),
    "yarn truncated": ("llama_yarn_factor", lambda c: scaled(c, truncate=True)),
    "rope on all layers": ("smollm3", lambda c: {"layer_rope": [0] * c.num_layers}),
    "one rope for both kinds of layer": ("gemma3", lambda c: {"layer_rope": [0] * c.num_layers}),
    "qk-norm before rope": ("hunyuan", lambda c: {"qk_norm_after_rope": False}),
    "qk-norm after rope": ("qwen3", lambda c: {"qk_norm_after_rope": True}),
    "score scale": ("gemma2", lambda c: {"scale": c.head_dim**-0.5}),
    "score cap": ("gemma2", lambda c: {"attn_softcap": None}),
    "logit cap": ("gemma2", lambda c: {"logit_softcap": None}),
    "no window": ("mistral", lambda c: {"windows": [None] * c.num_layers}),
    "window too long by one": ("mistral", lambda c: {"windows": [zoo.WINDOW + 1] * c.num_layers}),
    "window on the other layers": ("olmo3", lambda c: {"windows": c.windows[::-1]}),
    "embedding scale": ("granite", lambda c: {"embed_scale": 1.0}),
    "residual scale": ("granite", lambda c: {"residual_scale": 1.0}),
    "logit scale": ("cohere2", lambda c: {"logit_scale": 1.0}),
    "query temperature": ("ministral3", lambda c: {"query_temperature": None}),
    "no chunks": ("llama4_dense", lambda c: {"chunks": []}),
    "bare norm of q and k": ("llama4_dense", lambda c: {"qk_norm": "off"}),
    "temperature on all layers": ("llama4_dense", lambda c: {"query_temperature_without_rope": False}),
    "activation": ("gemma3", lambda c: {"activation": "gelu"}),
    "router's weights not renormalised": ("mixtral", lambda c: experts(c, renormalize=False)),
    "router's weights renormalised": ("olmoe", lambda c: experts(c, renormalize=True)),
    "one expert fewer": ("qwen3_moe", lambda c: experts(c, top_k=c.moe.top_k - 1)),
    "softmax over all": ("granitemoe", lambda c: experts(c, routing="softmax")),
    "softmax for sigmoid": ("minimax_m2", lambda c: experts(c, routing="softmax")),
    "groups ignored": ("glm4_moe", lambda c: experts(c, groups=1, topk_groups=1)),
    "groups scored by their best": ("glm4_moe", lambda c: experts(c, group_score="max")),
    "scaling factor": ("dots1", lambda c: experts(c, scale=1.0)),
    "eps of a latent's norm": ("deepseek_v3_dense", lambda c: latent(c, norm_eps=c.norm_eps)),
    "latent rope in halves": ("deepseek_v3_dense", lambda c: {"rope_interleaved": False}),
    "latent rope interleaved": ("deepseek_v3_halves", lambda c: {"rope_interleaved": True}),
    "yarn's share of the scale": ("deepseek_v2_dense", lambda c: {"scale": c.head_dim**-0.5}),
    "yarn's mscale on cos and sin": ("deepseek_v2_dense", lambda c: scaled(c, mscale=0.8)),
    "query temperature of a latent": ("mistral4_dense", lambda c: {"query_temperature": None}),
}


@pytest.mark.parametrize("knob", WRONG)
def test_a_wrong_knob_is_seen(knob: str):
    name, change = WRONG[knob]
    ids, theirs = reference(name)
    config = Checkpoint.open(folder(name)).config
    wrong = our_model(folder(name), dataclasses.replace(config, **change(config)))
    assert error(our_logits(wrong, ids, [len(ids)]), theirs) > 10 * TOLERANCE
