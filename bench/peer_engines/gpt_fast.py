"""gpt-fast: model.py of a checkout, with these weights, decoding compiled as its generate.py does.

    git clone https://github.com/meta-pytorch/gpt-fast && git -C gpt-fast checkout 24428d7
    python -m bench.peers --gpt-fast gpt-fast

That is a commit from before its attention became FlexAttention, whose masks would need a loop of another kind.

Its generate() repeats one prompt and samples; the loop here takes a batch of prompts of one length and the likeliest
token. Its rotary embedding turns neighbours, so the rows of q and k change places as for GGUF.
"""

import json
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.peer_engines import Row, Tokens

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "model.layers": "layers",
}


class GptFast:
    def __init__(self, model: Any):
        if "mask" in signature(model.forward).parameters:
            raise NotImplementedError("this checkout's model wants FlexAttention's masks: check out 24428d7")
        self.model, self.row = model.eval(), None
        torch._dynamo.config.recompile_limit = 64  # one graph for each row
        self.decode = torch.compile(next_tokens, fullgraph=True, dynamic=False)

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row], checkout: str) -> "GptFast":
        code = import_model(Path(checkout))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = code.Transformer(model_args(code, config))
        model.load_state_dict(convert(load_file(folder / "model.safetensors"), config), assign=True)
        return cls(model)

    @torch.inference_mode()
    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        if row != self.row:
            self.model.max_batch_size = -1  # else it would keep larger caches, which fit no smaller batch
            self.model.setup_caches(row.batch, row.longest)
            self.row = row
        ids = torch.tensor(prompts)
        tokens = next_tokens(self.model, ids, torch.arange(ids.shape[1]))
        outputs = [tokens]
        for position in range(ids.shape[1], ids.shape[1] + new - 1):
            tokens = self.decode(self.model, tokens, torch.tensor([position]))
            outputs.append(tokens)
        return torch.cat(outputs, 1).tolist()


def next_tokens(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """ids [B, S] at positions [S] -> the likeliest tokens after them [B, 1]"""
    return model(ids, positions)[:, -1].argmax(-1, keepdim=True)


# ---- its model, our weights


def import_model(checkout: Path) -> Any:
    """model.py of a checkout, under a name that does not hide Folio's."""
    path = checkout / "model.py"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: --gpt-fast takes the folder of a checkout")
    spec = spec_from_file_location("gpt_fast_model", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_args(code: Any, config: dict[str, Any]) -> Any:
    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    plain = rope.get("rope_type", "default") == "default" and config["model_type"] == "llama"
    if not plain or (config.get("head_dim") or 0) not in (0, config["hidden_size"] // heads):
        raise ValueError(f"gpt-fast has no {config['model_type']} with such heads or RoPE; plain Llamas only")
    return code.ModelArgs(
        block_size=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        n_layer=config["num_hidden_layers"],
        n_head=heads,
        n_local_heads=config["num_key_value_heads"],
        dim=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        rope_base=rope.get("rope_theta") or config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    converted = {}
    for name, weight in weights.items():
        weight = weight.float()
        if ".q_proj." in name or ".k_proj." in name:
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        converted[name] = weight
    converted.setdefault("output.weight", converted["tok_embeddings.weight"])
    return converted
