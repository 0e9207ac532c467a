"""How tests wait: for what happens, never for a time, so that a busy machine makes them slow and not red."""

import time
from collections.abc import Callable

HANG = 300  # seconds after which a wait is taken for a hang


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.002)
