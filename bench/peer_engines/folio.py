"""Folio itself, plain or compiled."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.common import progress
from bench.peer_engines import PAGE, Arrival, Row, Served, Tokens
from checkpoint import Checkpoint, load
from engine import Engine, SamplingParams
from machine import release_openmp_team
from model import Transformer


class Folio:
    def __init__(self, model: Transformer, rows: Sequence[Row], compiled: bool, radix: bool = False):
        """Room for the largest row. radix: False where the same prompts come again and again."""
        self.engine = Engine(
            model,
            max_batch_size=max(row.batch for row in rows),
            max_model_len=max(row.longest for row in rows),
            max_total_tokens=max(row.batch * -(-row.longest // PAGE) * PAGE for row in rows),
            page_size=PAGE,
            radix=radix,
        )
        for shape in self.engine.compile(greedy=True, masked=False) if compiled else ():
            progress(f"  folio-compiled: {shape}")

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row], compiled: bool) -> "Folio":
        """For a process of its own."""
        longest = max(row.longest for row in rows)
        model = load(Checkpoint.open(folder), torch.float32, torch.device("cpu"), longest)
        return cls(model, rows, compiled, radix=True)

    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        outputs = self.engine.generate(prompts, greedy(new))
        let_go(self.engine)
        return [output.outputs[0].token_ids for output in outputs]

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        start, waiting = time.perf_counter(), list(arrivals)[::-1]
        served: dict[str, Served] = {}
        while waiting or self.engine.has_work:
            while waiting and waiting[-1].at <= time.perf_counter() - start:
                arrival = waiting.pop()
                served[self.engine.add(arrival.prompt, greedy(arrival.new))] = Served([], [])
            if not self.engine.has_work:
                time.sleep(max(0.0, waiting[-1].at - (time.perf_counter() - start)))
                continue
            deltas, now = self.engine.step(), time.perf_counter() - start
            for delta in deltas:
                served[delta.request_id].tokens += delta.token_ids
                served[delta.request_id].times += [now] * len(delta.token_ids)
        let_go(self.engine)
        return list(served.values())


def greedy(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=True)


def let_go(engine: Engine) -> None:
    """End the OpenMP threads of the engine's device thread, which would slow the next engine of this process down."""
    engine.runner.stream.submit(_release).result()


def _release() -> list[torch.Tensor]:
    release_openmp_team()
    return []
