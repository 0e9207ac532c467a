"""A checkpoint folder or hub id -> a Transformer with its weights, and back.

The model is built without memory (meta device), then filled module by module: read through mmap, cast, fused (q, k and v
into one matrix, gate and up into another), packed for the CPU, assigned. The file is opened anew for each block, so that
what has been copied is unmapped at once: at no time is more in memory than the weights and one block. On a CPU the
embedding table stays in the mapped file; a step touches a few of its rows.

Only safetensors is read. Nothing is ever unpickled, no code of a checkpoint is run.

    python -m pytest tests/test_checkpoint.py
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import UserError
from families import FAMILIES, Family, model_config
from kernels.linear import unpack
from layers import Linear
from model import ModelConfig, Transformer

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
    raw_config: dict[str, Any]
    config: ModelConfig

    @classmethod
    def open(cls, model: str | Path) -> "Checkpoint":
        path = resolve(model)
        raw = _read_json(path / "config.json")
        if raw is None:
            raise UserError(f"{path} has no config.json: not a Hugging Face checkpoint")
        return cls(path, raw, model_config(raw))

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for path in sorted(set(self.files.values())):
            with _safe_open(path) as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        return shapes

    def read(self, names: list[str]) -> list[Tensor]:
        """The named tensors, mapped: no memory is used until they are, and it is given back when they go."""
        tensors = []
        for name in names:
            with _safe_open(self.files[name]) as file:
                tensors.append(file.get_tensor(name))
        return tensors


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
            parts = checkpoint.read(sources[f"{name}.{key}"])
            keep_mapped = name == "embed" and device.type == "cpu"
            weight = parts[0] if keep_mapped else _fuse(parts, dtype, device)
            setattr(module, key, nn.Parameter(weight.view(empty.shape), requires_grad=False))
            del parts, weight
        if isinstance(module, Linear):
            module.pack()
    return model.to(device).eval()


def save(model: Transformer, raw_config: dict[str, Any], folder: str | Path) -> None:
    """Write config.json and model.safetensors as `transformers` would; `raw_config` is the checkpoint's own config."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sources = tensor_names(model.config, FAMILIES[raw_config["model_type"]])
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        names = sources[name]
        if name == "head.weight" and model.config.tie_embeddings:
            continue
        plain = unpack(parameter.data).to("cpu", model.dtype)
        for part_name, part in zip(names, plain.split(_part_rows(model.config, name, len(names))), strict=True):
            tensors[part_name] = part.contiguous().clone()
    config = raw_config | {"dtype": str(model.dtype).removeprefix("torch.")}
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
        "attn.qkv": ["self_attn.qkv_proj"] if "qkv" in family.fused else [f"self_attn.{x}_proj" for x in "qkv"],
        "attn.out": ["self_attn.o_proj"],
        "mlp.gate_up": ["mlp.gate_up_proj"] if "gate_up" in family.fused else ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }
    norms = dict(family.norms)
    for ours, theirs in zip(("q_norm", "k_norm"), family.qk_norm_names, strict=True):
        norms[f"attn.{ours}"] = f"self_attn.{theirs}"
    for i in range(config.num_layers):
        for ours, theirs in linears.items():
            for key in ("weight", "bias"):
                names[f"blocks.{i}.{ours}.{key}"] = [f"model.layers.{i}.{t}.{key}" for t in theirs]
        for ours, theirs in norms.items():
            names[f"blocks.{i}.{ours}.weight"] = [f"model.layers.{i}.{theirs}.weight"]
    return names


def _check_tensors(checkpoint: Checkpoint, model: Transformer, sources: dict[str, list[str]]) -> None:
    have = checkpoint.shapes()
    need: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        rows = _part_rows(model.config, name, len(sources[name]))
        sizes = rows if isinstance(rows, list) else [parameter.shape[0]]
        for part, size in zip(sources[name], sizes, strict=True):
            need[part] = (size, *parameter.shape[1:])
    extra = [n for n in have if n not in need and not _ignorable(n, model.config)]
    shaped = [f"{n} is {list(have[n])}, not {list(s)}" for n, s in need.items() if n in have and have[n] != s]
    for what, found in (
        ("is missing", [n for n in need if n not in have]),
        ("has unknown", extra),
        ("has mis-shaped", shaped),
    ):
        if found:
            raise UserError(f"{checkpoint.path} {what} {len(found)} tensor{'s' * (len(found) > 1)}: {_few(found)}")


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Old checkpoints store RoPE buffers, and a tied head twice."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def _part_rows(config: ModelConfig, name: str, parts: int) -> list[int] | int:
    """How many rows of our parameter each of its `parts` tensors makes up (all, if there is one)."""
    if parts == 3:
        return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return [config.intermediate_size] * 2 if parts == 2 else 1 << 62


def _fuse(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stack the parts in memory of our own, in the dtype and on the device they will stay on."""
    fused = torch.empty(sum(p.shape[0] for p in parts), *parts[0].shape[1:], dtype=dtype, device=device)
    for target, part in zip(fused.split([p.shape[0] for p in parts]), parts, strict=True):
        target.copy_(part)
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
