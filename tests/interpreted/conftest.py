"""Tests of the Triton kernels: on a CPU in Triton's interpreter, on a GPU as they are.

The interpreter has to be chosen before Triton is imported, and a process that has used it compiles no more. So a plain
`pytest` collects these files only where there is a GPU; elsewhere `tests/test_interpreted.py` runs them in processes of
their own.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted
    python -m pytest -m gpu
"""

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import interpreter_bf16

    interpreter_bf16.install()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
