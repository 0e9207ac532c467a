"""Checkpoints as they come, sharded, old, damaged or wrong; and `save`, read back by `transformers`.

pytest tests/test_checkpoint.py
"""

import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_families import TOLERANCE, error, folder, our_logits, reference
from transformers import AutoModelForCausalLM, Llama4Config, Llama4ForConditionalGeneration

from checkpoint import Checkpoint, load, resolve, save
from errors import UserError
from families import FAMILIES, WRAPPERS
from kernels.linear import can_pack
from layers import Linear
from model import Transformer

CPU = torch.device("cpu")


def open_and_load(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load(Checkpoint.open(path), dtype, CPU)


def copy_of(name: str, path: Path) -> Path:
    return Path(shutil.copytree(folder(name), path / name))


def rewrite(path: Path, change) -> None:
    """Load model.safetensors, let `change` edit the dict of tensors, store it again."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def assert_same_logits(model: Transformer, name: str, tolerance: float = TOLERANCE) -> None:
    ids, theirs = reference(name)
    assert error(our_logits(model, ids, [len(ids)]), theirs) < tolerance


@torch.no_grad()
def their_logits(path: Path, name: str) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()(reference(name)[0][None]).logits[0]


def refusal(path: Path) -> str:
    """The one line that loading it gives."""
    with pytest.raises(UserError) as refused:
        open_and_load(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- out and in again


@pytest.mark.parametrize(
    "name",
    [
        "llama2",
        "llama3",
        "phi3",
        "glm4",
        "qwen2",
        "cohere_qk_norm",
        "gpt_oss",
        "llama4",
        "deepseek_v3",
        "deepseek_v2_lite",
        "mixtral",
        "qwen2_moe",
        "granitemoeshared",
        "dots1",
    ],
)
def test_what_we_save_transformers_loads(name: str, tmp_path: Path):
    checkpoint = Checkpoint.open(folder(name))
    save(load(checkpoint, torch.float32, CPU), checkpoint.raw_config, tmp_path / "new" / "folder")
    written = tmp_path / "new" / "folder"
    assert error(their_logits(written, name), reference(name)[1]) < TOLERANCE
    ours, original = load_file(written / "model.safetensors"), load_file(folder(name) / "model.safetensors")
    assert ours.keys() == original.keys() and all(ours[key].equal(original[key]) for key in ours)
    assert_same_logits(open_and_load(written), name)


def test_save_in_bfloat16(tmp_path: Path):
    checkpoint = Checkpoint.open(folder("llama3"))
    save(load(checkpoint, torch.bfloat16, CPU), checkpoint.raw_config, tmp_path)
    assert Checkpoint.open(tmp_path).dtype == torch.bfloat16
    ours, original = load_file(tmp_path / "model.safetensors"), load_file(folder("llama3") / "model.safetensors")
    assert all(ours[key].equal(original[key].bfloat16()) for key in original)


@pytest.mark.parametrize("name", ["llama2", "gemma2", "phi3"])
def test_shards(name: str, tmp_path: Path):
    zoo.build(name).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same_logits(open_and_load(tmp_path), name)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another layout, which the index does not list")
    assert_same_logits(open_and_load(tmp_path), name)


def test_a_missing_shard(tmp_path: Path):
    zoo.build("llama2").save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    message = refusal(tmp_path)
    assert shards[1].name in message and f"of the {len(shards)} files" in message


@pytest.mark.parametrize("name", ["llama3", "phi3"])
def test_a_bfloat16_checkpoint_in_float32(name: str, tmp_path: Path):
    zoo.build(name).bfloat16().save_pretrained(tmp_path)
    assert Checkpoint.open(tmp_path).dtype == torch.bfloat16
    model = open_and_load(tmp_path)
    assert model.dtype == torch.float32
    ids, exact = reference(name)
    ours = our_logits(model, ids, [len(ids)])
    assert error(ours, their_logits(tmp_path, name)) < TOLERANCE
    assert error(ours, exact) > TOLERANCE  # bfloat16 weights they are


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_stays_mapped_and_the_linears_are_packed(dtype: torch.dtype):
    """A tied head is a packed copy; the table itself keeps the dtype of the file."""
    model = open_and_load(folder("llama3"), dtype)
    assert model.embed.weight.dtype == torch.float32 and not model.embed.weight.is_mkldnn
    assert model.embed.weight.equal(load_file(folder("llama3") / "model.safetensors")["model.embed_tokens.weight"])
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    assert len(linears) == 4 * model.config.num_layers + 1
    for layer in linears:
        assert layer.weight.is_mkldnn == can_pack(torch.empty(1, dtype=dtype))
        assert layer.weight.dtype == dtype and not layer.weight.requires_grad
    assert not any(p.is_meta for p in model.parameters()) and not model.training


def test_old_layouts_of_tensors(tmp_path: Path):
    """RoPE buffers, and a tied head that is stored as well: ignored."""

    def add(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
        for i in range(4):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    path = copy_of("llama3", tmp_path)
    rewrite(path, add)
    assert_same_logits(open_and_load(path), "llama3")


def test_the_text_of_a_model_that_also_sees(tmp_path: Path):
    """Llama 4 comes inside of a model with eyes. They are left aside, with a note."""
    vision = dict(hidden_size=32, intermediate_size=128, num_attention_heads=2, num_hidden_layers=1, patch_size=4)
    vision |= dict(image_size=8, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
    text = zoo.FAMILIES["llama4_dense"]().to_dict()
    whole = Llama4ForConditionalGeneration(Llama4Config(vision_config=vision, text_config=text)).eval()
    whole.language_model.load_state_dict(zoo.build("llama4_dense").state_dict())
    whole.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.notes == ["left aside: multi_modal_projector, vision_model (not text)"]
    assert_same_logits(load(checkpoint, torch.float32, CPU), "llama4_dense")
    save(load(checkpoint, torch.float32, CPU), checkpoint.raw_config, tmp_path / "text")
    assert_same_logits(open_and_load(tmp_path / "text"), "llama4_dense")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"text_config": None}))
    assert "config.json of a llama4 model must have a text_config, not None" in refusal(tmp_path)


@pytest.mark.parametrize(
    "generation, config, ids",
    [(None, 5, [5]), (None, [5, 6], [5, 6]), (7, 5, [7]), ([7, 8], 5, [7, 8]), (None, None, [])],
)
def test_eos_token_ids(generation, config, ids: list[int], tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"eos_token_id": config}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation} if generation else {}))
    assert Checkpoint.open(path).eos_token_ids == ids
    (path / "generation_config.json").unlink()
    assert Checkpoint.open(path).eos_token_ids == (ids if generation is None else [5])


# ---- tensors that do not match


def test_missing_tensors_are_named(tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    rewrite(path, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    message = refusal(path)
    assert "is missing 1 tensor: model.layers.2.mlp.up_proj.weight" in message and str(path) in message
    rewrite(path, lambda t: [t.pop(name) for name in list(t) if "layers.3" in name])
    assert "is missing 10 tensors: " in (message := refusal(path)) and message.endswith("and 7 more")


def test_an_untied_head_is_not_replaced_by_the_embedding(tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    rewrite(path, lambda t: t.pop("lm_head.weight"))
    assert "is missing 1 tensor: lm_head.weight" in refusal(path)


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.q_proj.bias", "model.layers.4.mlp.up_proj.weight", "score"]
)
def test_unknown_tensors_are_named(extra: str, tmp_path: Path):
    """A bias that the config does not know of, a layer too many: another model than it says."""
    path = copy_of("llama2", tmp_path)
    rewrite(path, lambda t: t.update({extra: torch.zeros(64)}))
    assert f"has unknown 1 tensor: {extra}" in refusal(path)


@pytest.mark.parametrize(
    "name, tensor, shape, wanted",
    [
        ("llama2", "model.layers.1.self_attn.k_proj.weight", (32, 64), "[64, 64]"),
        ("llama2", "model.embed_tokens.weight", (127, 64), "[128, 64]"),
        ("llama2", "model.norm.weight", (65,), "[64]"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (191, 64), "[192, 64]"),
        ("llama2", "model.layers.0.mlp.down_proj.weight", (96, 64), "[64, 96]"),  # transposed
    ],
)
def test_misshapen_tensors_are_named(name: str, tensor: str, shape: tuple, wanted: str, tmp_path: Path):
    path = copy_of(name, tmp_path)
    rewrite(path, lambda t: t.update({tensor: torch.zeros(shape)}))
    assert f"has mis-shaped 1 tensor: {tensor} is {list(shape)}, not {wanted}" in refusal(path)


# ---- files that are not what they should be


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file(keep: int, tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(path)
    assert str(file) in message and "damaged or cut short" in message and f"{file.stat().st_size:,} bytes" in message


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_not_opened(file: str, tmp_path: Path):
    path, sprung = copy_of("llama2", tmp_path), tmp_path / "sprung"
    (path / "model.safetensors").unlink()
    (path / file).write_bytes(pickle.dumps(Trap(sprung)))
    message = refusal(path)
    assert file in message and "pickles" in message and "save_pretrained" in message
    assert not sprung.exists()
    pickle.loads((path / file).read_bytes()).close()
    assert sprung.exists()  # the trap works


def test_no_weights_at_all(tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    (path / "model.safetensors").unlink()
    assert (message := refusal(path)).endswith("has no *.safetensors") and str(path) in message


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/nowhere"])
def test_no_such_folder(name: str, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=f"no such folder: {name}"):
        resolve(name)


def test_a_file_in_place_of_a_folder():
    file = folder("llama2") / "model.safetensors"
    with pytest.raises(UserError, match=r"is a file; a checkpoint is a folder with config\.json"):
        resolve(file)


def test_no_config(tmp_path: Path):
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "llama",', "not json", "\x00", "[]", '"llama"', "3"])
def test_a_broken_config(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path / "config.json") in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index(text: str, tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    (path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_act": "swish9"}, "swish9"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 10.0}}, "spiral"),
        ({"num_hidden_layers": 5}, "model.layers.4"),
    ],
)
def test_a_config_that_makes_no_sense(change: dict, named: str, tmp_path: Path):
    path = copy_of("llama2", tmp_path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | change))
    assert named in refusal(path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"kv_lora_rank": None}, "kv_lora_rank is None; it must be a whole number, at least 1"),
        ({"v_head_dim": 0}, "v_head_dim is 0; it must be a whole number, at least 1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; it must be even"),
        ({"kv_lora_rank": 25}, "self_attn.kv_a_proj_with_mqa.weight is [32, 64], not [33, 64]"),
        ({"v_head_dim": 21}, "self_attn.kv_b_proj.weight is [128, 24], not [132, 24]"),
        ({"qk_nope_head_dim": 13}, "self_attn.q_b_proj.weight is [80, 40], not [84, 40]"),
        ({"q_lora_rank": None}, "self_attn.q_proj.weight"),
    ],
    ids=str,
)
def test_sizes_of_a_latent_that_make_no_sense(change: dict, named: str, tmp_path: Path):
    """A field that is missing is not guessed, and one that contradicts the tensors is refused by their names."""
    path = copy_of("deepseek_v3_dense", tmp_path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | change))
    assert named in refusal(path)
    if change == {"kv_lora_rank": None}:
        del raw["kv_lora_rank"]
        (path / "config.json").write_text(json.dumps(raw))
        assert "kv_lora_rank is missing; it must be" in refusal(path)


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path: Path):
    """`transformers` has no such model type; the released config.json names it."""
    path = copy_of("deepseek_v3_dense", tmp_path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"model_type": "kimi_k2"}))
    assert_same_logits(open_and_load(path), "deepseek_v3_dense")


@pytest.mark.parametrize(
    "raw", [{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, {"vocab_size": 3}], ids=str
)
def test_an_unsupported_architecture_lists_those_that_are(raw: dict, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    message = refusal(tmp_path)
    assert repr(raw.get("model_type")) in message and all(a in message for a in raw.get("architectures", []))
    assert all(name in message for name in (*FAMILIES, *WRAPPERS))


# ---- the hub


@pytest.mark.parametrize(
    "error", [OSError("no route\nto the hub"), RuntimeError("401 Unauthorized"), TimeoutError()], ids=repr
)
def test_whatever_the_hub_says_is_one_line(error: Exception, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        UserError, match="someone/model is neither a folder here nor a model that the hub gives"
    ) as refused:
        resolve("someone/model")
    assert "\n" not in str(refused.value) and (str(error).split("\n")[0] in str(refused.value))


def test_a_hub_id_offline(monkeypatch, tmp_path: Path):
    """The real client, told to be offline, with an empty cache."""
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("touched the network"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match="someone/model is neither a folder here nor a model that the hub gives: .+"
    ) as e:
        resolve("someone/model")
    assert "\n" not in str(e.value)


def test_a_hub_id_asks_for_no_pickles(monkeypatch):
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(folder("llama2"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("someone/model").config.hidden_size == 64
    assert asked["name"] == "someone/model" and "*.safetensors" in asked["patterns"] and "*.json" in asked["patterns"]
    assert not any(p.endswith((".bin", ".pt", ".pth", "*", ".py")) for p in asked["patterns"])
