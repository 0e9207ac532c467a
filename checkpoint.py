"""A checkpoint folder or hub id -> a Transformer with its weights, and back.

The model is built without memory (meta device), then filled module by module: read through mmap, cast, fused (q, k and v
into one matrix, gate and up into another), packed for the CPU, assigned. The file is opened anew for each block, so that
what has been copied is unmapped at once: at no time is more in memory than the weights and one block. On a CPU the
embedding table stays in the mapped file; a step touches a few of its rows. Weights in 8 or 4 bits are expanded on the way
(`quantized.py`).

Only safetensors is read. Nothing is ever unpickled, no code of a checkpoint is run.

    python -m pytest tests/test_checkpoint.py
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import UserError
from families import FAMILIES, Family, MoENames, model_config, text_model
from kernels.linear import unpack
from layers import Linear
from model import ModelConfig, Transformer
from moe import Experts, Router
from quantized import Fp8, Quantization, Source, Stored, quantization, stored_as, weight_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(model: str | Path) -> Path:
    """A local folder as it is; anything else is a hub id, fetched (or found) by huggingface_hub, safetensors only."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model} is a file; a checkpoint is a folder with config.json and *.safetensors")
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise UserError(f"no such folder: {model}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (
        Exception
    ) as error:  # offline, unknown id, no access, a broken cache: each has its own class in the hub's client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{model} is neither a folder here nor a model that the hub gives: {reason}") from error


@dataclass
class Checkpoint:
    """What a folder holds, read without touching a weight."""

    path: Path
    raw_config: dict[str, Any]  # of the text model
    config: ModelConfig
    quantization: Quantization | None = None
    prefix: str = ""  # of the text model's tensors, where there are others

    @classmethod
    def open(cls, model: str | Path) -> "Checkpoint":
        path = resolve(model)
        raw = _read_json(path / "config.json")
        if raw is None:
            raise UserError(f"{path} has no config.json: not a Hugging Face checkpoint")
        raw, prefix = text_model(raw)
        return cls(path, raw, model_config(raw), quantization(raw), prefix)

    @property
    def family(self) -> Family:
        return FAMILIES[self.raw_config["model_type"]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weights are stored in, as config.json has it."""
        return DTYPES.get(self.raw_config.get("dtype") or self.raw_config.get("torch_dtype"), torch.float32)

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends a text: generation_config.json first, config.json otherwise."""
        for source in (_read_json(self.path / "generation_config.json"), self.raw_config):
            ids = (source or {}).get("eos_token_id")
            if ids is not None:
                return [ids] if isinstance(ids, int) else list(ids)
        return []

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        index = _read_json(self.path / "model.safetensors.index.json")
        if index is not None:
            if not isinstance(index.get("weight_map"), dict):
                raise UserError(f"{self.path}/model.safetensors.index.json has no weight_map")
            shards = sorted(set(index["weight_map"].values()))
            paths = [self.path / shard for shard in shards]
            missing = [p.name for p in paths if not p.exists()]
            if missing:
                raise UserError(f"{self.path} lacks {_few(missing)} of the {len(shards)} files in its index")
        else:
            single = self.path / "model.safetensors"
            paths = [single] if single.exists() else sorted(self.path.glob("*.safetensors"))
        if not paths:
            pickles = sorted(p.name for p in self.path.glob("*.bin")) + sorted(p.name for p in self.path.glob("*.pt*"))
            hint = "; these are pickles, which can run code, and are not read. Convert once where you trust them: " + (
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
            )
            raise UserError(f"{self.path} has no *.safetensors" + (f", only {_few(pickles)}{hint}" if pickles else ""))
        files = {}
        for path in paths:
            with _safe_open(path) as file:
                files.update(dict.fromkeys(file.keys(), path))
        return files

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Weight of the text model -> the tensors that it is stored as. Neither has the prefix."""
        found: dict[str, Stored] = {}
        for path in sorted(set(self.files.values())):
            with _safe_open(path) as file:
                for name in file.keys():
                    if name.startswith(self.prefix):
                        tensor = file.get_slice(name)
                        found[name.removeprefix(self.prefix)] = Stored(tensor.get_dtype(), tuple(tensor.get_shape()))
        return stored_as(found, self.quantization)

    def read(self, names: list[str], dtype: torch.dtype) -> list[Tensor | Fp8]:
        """The named weights, mapped: no memory is used until they are, and it is given back when they go.

        But mxfp4 is expanded to `dtype` at once: one weight is all experts of a block.
        """
        parts = {name: [self.prefix + part for part in self.sources[name].parts] for name in names}
        with ExitStack() as stack:  # each file once: its header lists every tensor, and experts are thousands
            paths = {self.files[part] for name in names for part in parts[name]}
            files = {path: stack.enter_context(_safe_open(path)) for path in paths}
            tensors = ([files[self.files[part]].get_tensor(part) for part in parts[name]] for name in names)
            return [weight_of(each, self.quantization, dtype) for each in tensors]

    @property
    def prediction_layers(self) -> range:
        """Layers behind the last one that predict the token after the next (DeepSeek-V3, GLM 4.5). They are not loaded."""
        count = self.raw_config.get("num_nextn_predict_layers") or 0
        if not isinstance(count, int):
            raise UserError(f"num_nextn_predict_layers must be an integer, not {count!r}")
        return range(self.config.num_layers, self.config.num_layers + count)

    @property
    def notes(self) -> list[str]:
        """What the user should know of how this folder is read, a line each."""
        ahead = [i for i in self.prediction_layers if any(_in_layer(name, i) for name in self.sources)]
        reasons = {
            "not text": sorted({name.split(".")[0] for name in self.files if not name.startswith(self.prefix)}),
            "for predicting tokens ahead": [f"model.layers.{i}" for i in ahead],
        }
        return [f"left aside: {_few(names)} ({reason})" for reason, names in reasons.items() if names]


def load(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, max_model_len: int | None = None
) -> Transformer:
    """-> the model with all weights on `device`. UserError lists tensors that are missing, extra or of another shape."""
    with torch.device("meta"):
        model = Transformer(checkpoint.config, max_model_len)
    sources = tensor_names(checkpoint.config, checkpoint.family)
    _check_tensors(checkpoint, model, sources)
    modules = dict(model.named_modules())
    share_head = checkpoint.config.tie_embeddings and device.type != "cpu"
    for name, module in sorted(modules.items(), key=lambda item: item[0] not in ("embed", "head")):  # the largest first
        if share_head and name == "head":
            module.weight = model.embed.weight
            continue
        for key, empty in list(module.named_parameters(recurse=False)):
            parts = checkpoint.read(sources[f"{name}.{key}"], dtype)
            if isinstance(module, Experts):
                parts = [as_ours(p, key, checkpoint.family.moe) if isinstance(p, Tensor) else p for p in parts]
            keep_mapped = name == "embed" and device.type == "cpu" and isinstance(parts[0], Tensor)
            keep_exact = isinstance(module, Router)
            weight = parts[0] if keep_mapped else _fuse(parts, torch.float32 if keep_exact else dtype, device)
            setattr(module, key, nn.Parameter(weight.view(empty.shape), requires_grad=False))
            del parts, weight
        if isinstance(module, Linear | Experts):
            module.pack()
    return model.to(device).eval()


def save(model: Transformer, raw_config: dict[str, Any], folder: str | Path) -> None:
    """Write config.json and model.safetensors as `transformers` would; `raw_config` is the checkpoint's own config."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[raw_config["model_type"]]
    sources = tensor_names(model.config, family)
    tensors: dict[str, Tensor] = {}
    for name, plain in _plain_weights(model):
        names = sources[name]
        if name == "head.weight" and model.config.tie_embeddings:
            continue
        exact = name.endswith("correction_bias")  # float32 in checkpoints of any dtype
        plain = plain.to("cpu", torch.float32 if exact else model.dtype)
        for part_name, part in zip(names, _in_parts(plain, name, len(names), model.config, family), strict=True):
            tensors[part_name] = part.contiguous().clone()
    config = raw_config | {"dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("quantization_config", None)  # it is not any more
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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


def _plain_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name, unpacked one at a time."""
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{key}", unpack(parameter.data)
        if isinstance(module, Experts):
            for key in module.packed:
                yield f"{name}.{key}", module.plain(key)


def _check_tensors(checkpoint: Checkpoint, model: Transformer, sources: dict[str, list[str]]) -> None:
    have = {name: source.shape for name, source in checkpoint.sources.items()}
    need: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        parts = _in_parts(parameter, name, len(sources[name]), checkpoint.config, checkpoint.family)
        need |= {part_name: tuple(part.shape) for part_name, part in zip(sources[name], parts, strict=True)}
    extra = [n for n in have if n not in need and not _ignorable(n, checkpoint)]
    shaped = [f"{n} is {list(have[n])}, not {list(s)}" for n, s in need.items() if n in have and have[n] != s]
    for what, found in (
        ("is missing", [n for n in need if n not in have]),
        ("has unknown", extra),
        ("has mis-shaped", shaped),
    ):
        if found:
            raise UserError(f"{checkpoint.path} {what} {len(found)} tensor{'s' * (len(found) > 1)}: {_few(found)}")


def _ignorable(name: str, checkpoint: Checkpoint) -> bool:
    """Old checkpoints store RoPE buffers, and a tied head twice; some have layers to predict tokens ahead."""
    if name.endswith("rotary_emb.inv_freq") or (checkpoint.config.tie_embeddings and name == "lm_head.weight"):
        return True
    return any(_in_layer(name, i) for i in checkpoint.prediction_layers)


def _in_layer(name: str, layer: int) -> bool:
    return name.startswith(f"model.layers.{layer}.")


def _in_parts(weight: Tensor, name: str, parts: int, config: ModelConfig, family: Family) -> Sequence[Tensor]:
    """Our weight -> the `parts` tensors that it is made of in the checkpoint."""
    if ".experts." in name:
        if parts == 1:
            return [as_theirs(weight, name.rsplit(".", 1)[1], family.moe)]
        weight = weight.flatten(0, 1)
    if ".qkv." in name and parts == 3:
        return weight.split([n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)])
    return weight.split(weight.shape[0] // parts)


def _fuse(parts: list[Tensor | Fp8], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stack the parts in memory of our own, in the dtype and on the device they will stay on."""
    fused = torch.empty(sum(p.shape[0] for p in parts), *parts[0].shape[1:], dtype=dtype, device=device)
    for target, part in zip(fused.split([p.shape[0] for p in parts]), parts, strict=True):
        if isinstance(part, Tensor):
            target.copy_(part)
        else:
            part.copy_to(target)
    return fused


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(path) if path.exists() else 0
        raise UserError(f"{path} ({size:,} bytes) is damaged or cut short: {error}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
