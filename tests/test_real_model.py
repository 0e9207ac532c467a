"""A real trained model against golden ids of an independent float64 reference, where there is one.

FOLIO_TEST_DATA names a folder with models/stories260K (a Hugging Face folder with golden.json: prompt_ids, greedy_ids).

    FOLIO_TEST_DATA=path/to/data pytest tests/test_real_model.py
"""

import json
import os
from pathlib import Path

import pytest

from engine import Engine, SamplingParams

MODEL = Path(os.environ.get("FOLIO_TEST_DATA", "no-such-folder")) / "models" / "stories260K"


@pytest.mark.skipif(not MODEL.exists(), reason="FOLIO_TEST_DATA is not set")
@pytest.mark.parametrize("chunk_size, page_size", [(2048, 16), (3, 1)])
def test_golden_ids(chunk_size: int, page_size: int):
    engine = Engine.from_pretrained(MODEL, dtype="float32", chunk_size=chunk_size, page_size=page_size)
    for sample in json.loads((MODEL / "golden.json").read_text())["samples"]:
        prompt, expected = sample["prompt_ids"], sample["greedy_ids"]
        new = expected[len(prompt) :] if expected[: len(prompt)] == prompt else expected
        params = SamplingParams(temperature=0, max_new_tokens=len(new), ignore_eos=True)
        assert engine.generate(prompt, params)[0].outputs[0].token_ids == new
        assert engine.tokenizer.encode(sample["prompt"]) == prompt
