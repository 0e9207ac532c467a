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
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import UserError
from families import FAMILIES, Family, model_config, text_model
from kernels.linear import unpack
from layers import Linear
from model import ModelConfig, Transformer
from moe import Experts, Router
from quantized import Fp8, Quantization, Source, Stored, quantization, stored_as, weight_of
from tensor_names import as_ours, in_parts, tensor_names

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
        for part_name, part in zip(names, in_parts(plain, name, len(names), model.config, family), strict=True):
            tensors[part_name] = part.contiguous().clone()
    config = raw_config | {"dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("quantization_config", None)  # it is not any more
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
        parts = in_parts(parameter, name, len(sources[name]), checkpoint.config, checkpoint.family)
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
