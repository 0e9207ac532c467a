"""What several test files share."""

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from server_process import Server, running

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell, which makes Ctrl-C mean nothing, here and in every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing about an example is timed: a busy machine is no failure.
settings.register_profile(
    "folio", deadline=None, suppress_health_check=list(HealthCheck), database=None, print_blob=True
)
settings.load_profile("folio")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Next to nothing is computed, and two threads that wait for each other on a busy machine take seconds over it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that several files share: 4 rows, a queue of 60, bodies of 1 MB at most."""
    with running("--max-running-requests", "4", "--max-queue", "60", "--max-body-mb", "1") as server:
        yield server
