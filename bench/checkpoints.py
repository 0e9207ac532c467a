"""The models that benchmarks run: random weights in known shapes, made once, and the bundled ones.

Speed does not depend on what the weights say. A checkpoint is a folder under the system's temporary one, so that every
engine loads the same.

    from bench.checkpoints import make_checkpoint
"""

import json
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch

from bench.common import progress

BUNDLED = {name: Path(__file__).parent.parent / "assets" / name for name in ("folio-tiny", "folio-tiny-mla")}
_ENDLESS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32")
# config.json of each. initializer_range is about 1.2 / sqrt(hidden_size): with the usual 0.02 a random model with a
# tied head repeats its last token for ever, and comparing that says little.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(
        model_type="llama",
        hidden_size=576,
        initializer_range=0.05,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        **_ENDLESS,
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2",
        hidden_size=896,
        initializer_range=0.04,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
        **_ENDLESS,
    ),
    "tiny": dict(
        model_type="llama",
        hidden_size=64,
        initializer_range=0.25,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=1024,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        **_ENDLESS,
    ),
}
SHAPES["smollm2-135m-152k"] = SHAPES["smollm2-135m"] | dict(vocab_size=151936)  # with a vocabulary of Qwen's size
SHAPES["smollm2-135m-1k"] = SHAPES["smollm2-135m"] | dict(vocab_size=1024)  # the bundled tokenizer spells every token
NAMES = (*SHAPES, *BUNDLED)


def make_checkpoint(shape: str) -> Path:
    """The folder of a bundled model, or of a random one, made if it is not there. Its name tells the settings."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape in BUNDLED:
        return BUNDLED[shape]
    settings = SHAPES[shape]
    tag = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    folder = Path(tempfile.gettempdir()) / "folio-bench" / f"{shape}-{tag:08x}"
    if (folder / "config.json").exists():
        return folder
    progress(f"{shape}: making a checkpoint in {folder}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero so far, which would hide a bias that is not added
            parameter.data.normal_(0, 0.5)
    folder.parent.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(unfinished)
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
    ):  # a server wants one; it knows the first ids of the vocabulary
        shutil.copy(BUNDLED["folio-tiny"] / file, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder
