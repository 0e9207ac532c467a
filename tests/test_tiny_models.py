"""The models that train_tiny trains: which weights they have, even experts without a loss for it, what a folder keeps.

python -m pytest tests/test_tiny_models.py
"""

from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from examples.tiny_models import ARCHITECTURES, BALANCE_RATE, Balance, build
from examples.train_tiny import BATCH, CHUNK, RECIPES, export, loss_of, optimizers_of, share_of_peak

ASSETS = Path(__file__).parent.parent / "assets"
FOLDERS = {"llama": ASSETS / "folio-tiny", "mla": ASSETS / "folio-tiny-mla"}
TOKENS = dict(vocab_size=1024, eos_token_id=2, pad_token_id=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_script_still_builds_what_is_bundled(architecture):
    built = build(architecture, **TOKENS)
    bundled = AutoModelForCausalLM.from_pretrained(FOLDERS[architecture], dtype=torch.float32)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (built, bundled)]
    assert shapes[0] == shapes[1] and type(built) is type(bundled)
    assert settings(built) == settings(bundled)


def settings(model: PreTrainedModel) -> dict:
    """Its config, without what saving and loading add."""
    return {k: v for k, v in model.config.to_diff_dict().items() if k not in ("architectures", "dtype")}


def test_the_correction_bias_is_saved_in_full(tmp_path):
    """In bfloat16 most of its steps would be lost: at 0.3 the next number is 0.002 away."""
    model = build("mla", **TOKENS)
    router = Balance(model).routers[0]
    router.e_score_correction_bias += torch.linspace(0.3, 0.301, router.num_experts)
    export(model, Tokenizer.from_file(str(FOLDERS["llama"] / "tokenizer.json")), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(Balance(loaded).routers[0].e_score_correction_bias, router.e_score_correction_bias)


def test_balance_evens_the_load_and_nothing_else():
    torch.manual_seed(0)
    model = build("mla", **TOKENS)
    balance = Balance(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    ids = torch.randint(5, 1024, (1, 256))
    loads = []
    with torch.no_grad():
        for _ in range(60):
            model(ids)
            loads.append(balance.step(0.01))
    assert loads[-1] < loads[0] / 2
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


def test_an_idle_expert_rises_and_a_busy_one_falls():
    model = build("mla", **TOKENS)
    balance = Balance(model)
    router = balance.routers[0]
    balance.load[router] += torch.tensor([4.0, 0, 1, 1, 1, 1, 0, 0])
    for other in balance.routers[1:]:
        balance.load[other] += 1
    assert balance.step(BALANCE_RATE) == 4.0
    signs = torch.tensor([-1.0, 1, 0, 0, 0, 0, 1, 1])
    assert torch.equal(router.e_score_correction_bias, BALANCE_RATE * signs)
    assert not any(other.e_score_correction_bias.any() for other in balance.routers[1:])
    assert not any(load.any() for load in balance.load.values())


@pytest.mark.parametrize("length", [40, 600])
def test_what_trains_faster_is_what_transformers_does(length: int):
    torch.manual_seed(0)
    model = build("mla", **TOKENS)
    batch = torch.randint(5, 1024, (2, 2, length + 1))
    batch[:, 1] %= 2
    losses, gradients = [], []
    for experts, attention in [(None, None), ("eager", "sdpa")]:
        if experts:
            model.set_experts_implementation(experts)
            model.set_attn_implementation(attention)
        loss = loss_of(model, batch, bf16=False)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    logits = model(batch[:, 0, :-1]).logits
    learn = batch[:, 1, 1:].bool()
    plain = torch.nn.functional.cross_entropy(logits[learn], batch[:, 0, 1:][learn])
    assert losses == pytest.approx([plain.item()] * 2, rel=1e-6)
    for (name, _), fast, slow in zip(model.named_parameters(), *gradients, strict=True):
        assert (fast - slow).abs().max() < 1e-5 * slow.abs().max(), name


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_has_one_optimizer(architecture: str, muon: bool):
    model = build(architecture, **TOKENS)
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names[id(p)] for g in o.param_groups for p in g["params"]] for o in optimizers_of(model, muon)]
    assert sorted(chain(*held)) == sorted(names.values()) and len(held) == 1 + muon
    for name in held[1] if muon else []:
        assert ".layers." in name and name.endswith(".weight")
    if muon:  # what is left to AdamW, beside vectors
        matrices = {name.split(".")[-2] for name in held[0] if model.get_parameter(name).dim() > 1}
        assert matrices <= {"embed_tokens", "gate", "experts"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_schedule_rises_stays_and_falls_to_nothing(recipe):
    shares = [share_of_peak(step, recipe.schedule) for step in range(recipe.schedule[-1][0] + 1)]
    top = [step for step, share in enumerate(shares) if share == 1]
    assert top == list(range(top[0], top[-1] + 1)) and shares[-1] == 0
    assert shares[: top[0]] == sorted(shares[: top[0]]) and shares[top[-1] :] == sorted(shares[top[-1] :], reverse=True)
    assert all(BATCH % length == 0 for length in recipe.rows) and sum(recipe.rows.values()) == pytest.approx(1)
    assert recipe.late is None or (top[0] < recipe.late < top[-1] and recipe.late % CHUNK == 0)
