"""The Triton kernels without a GPU: each file of `tests/interpreted` in a process with Triton's interpreter.

python -m pytest tests/test_interpreted.py
TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_attention.py      one of them, by hand
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def run(file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(command, env=environment, cwd=file.parents[2], capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future]]:
    """All that were asked for, as many at a time as there are cores."""
    wanted = {item.callspec.params["file"] for item in request.session.items if item.path == request.path}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in sorted(wanted)}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_under_the_interpreter(file: Path, runs: dict[Path, Future]):
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout[-300:])
