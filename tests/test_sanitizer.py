"""The Triton kernels under NVIDIA's compute-sanitizer: no read or write outside of a tensor, no race in shared memory.

python -m pytest -m gpu tests/test_sanitizer.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TESTS = "test_prefill or test_decode or test_extend or test_write_kv or test_rope"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_under_the_sanitizer(tool: str):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-x", "-q"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor is an allocation
    done = subprocess.run(
        [*command, "-k", TESTS, "tests/interpreted"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
