"""A checkpoint as a GGUF file in float32, for llama.cpp; no tokenizer: token ids go in and come out.

    write_gguf(folder, path)       # needs: pip install gguf

Llama's rotary embedding turns neighbours in GGUF and halves in a Hugging Face folder, so the rows of q and k change
places; Qwen 2's turns halves in both. The gguf package knows the tensors' names.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def write_gguf(folder: Path, path: Path) -> None:
    """Write the checkpoint of a folder (one model.safetensors) to `path`. ValueError for a model it does not know."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    rope = config.get("rope_parameters") or {}
    if kind not in ARCHITECTURES or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"no GGUF of a {kind} with {rope.get('rope_type')} RoPE; only plain {', '.join(ARCHITECTURES)}"
        )
    arch = ARCHITECTURES[kind]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    describe(writer, config, rope.get("rope_theta") or config["rope_theta"])
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():
            array = tensors.get_tensor(name).float().numpy()
            if kind == "llama" and ".q_proj." in name:
                array = interleave(array, config["num_attention_heads"])
            elif kind == "llama" and ".k_proj." in name:
                array = interleave(array, config["num_key_value_heads"])
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], theta: float) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """[H * D, in], each head's first half before its second -> the same rows with the halves' elements in turns."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
