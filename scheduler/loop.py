"""The step loop, twice: plain, and overlapped. Everything else is shared, so the difference is the whole of the technique.

normal_loop:    host   plan 1 |           | commit 1, plan 2 |           | commit 2
                device        | forward 1 |                  | forward 2 |

overlap_loop:   host   plan 1 | plan 2       | commit 1, plan 3 | commit 2, plan 4
                device        | forward 1    | forward 2        | forward 3

In the overlapped loop a step is launched before the ids of the one before have reached the host. They are future tokens: they
stay on the device, and the next step finds them by their row. Who ended is noticed one step late; that one surplus token is dropped
at the next commit, and row and pages go back then. (SGLang's zero-overhead scheduler; NanoFlow.)

Some requests cannot be sampled without the host: which tokens they may take depends on those they have. For a batch with such a
request the forward is launched, the host catches up, the mask is filled, then sampling is launched.

    python -m bench.overlap
"""

from collections.abc import Iterator
from typing import Any, Protocol

from scheduler.batch import Batch
from scheduler.scheduler import Scheduler

Masks = Any  # whatever runner and host have agreed on


class Step(Protocol):
    """A step on its way through the device."""

    def sample(self, masks: Masks) -> None:
        """Launch the sampling that `launch` has left out, with these masks."""

    def wait(self) -> Any:
        """Wait for the results, whatever runner and host have agreed on."""


class Device(Protocol):
    """Where steps run: the runner, or a stand-in."""

    def launch(self, batch: Batch) -> Step:
        """Start a step and return at once. Of a masked batch only the forward."""


class Host(Protocol):
    """What the loop's owner does between steps: the engine."""

    def commit(self, batch: Batch, results: Any) -> None:
        """Take the results of a step."""

    def masks(self, batch: Batch) -> Masks:
        """Fill the masks of a batch, now that all steps before it are committed."""


def normal_loop(scheduler: Scheduler, device: Device, host: Host) -> Iterator[None]:
    """One step each time round: plan, launch, wait, commit."""
    while True:
        batch = scheduler.plan()
        if batch is not None:
            step = device.launch(batch)
            if batch.masked:
                step.sample(host.masks(batch))
            host.commit(batch, step.wait())
        yield


def overlap_loop(scheduler: Scheduler, device: Device, host: Host) -> Iterator[None]:
    """One step each time round: plan and launch, then, while it runs, wait for the one before and commit it."""
    batch = step = None
    while True:
        last_batch, last_step = batch, step
        batch = scheduler.plan()
        if batch is not None:
            step = device.launch(batch)
        if last_batch is not None:
            host.commit(last_batch, last_step.wait())
        if batch is not None and batch.masked:
            step.sample(host.masks(batch))
        yield
