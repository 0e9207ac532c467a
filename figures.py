"""How fast a run was, as one line: tokens, seconds, and the share of the memory bandwidth that the decode reached.

A decode step reads each weight once, so weights per token over the machine's read bandwidth is the floor of its time;
MBU (model bandwidth utilisation) is that floor over the time measured. A model that fits into the cache can exceed 100 %.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import Engine
    from output import Delta


class Figures:
    """Times the steps of a run. `watch` wraps a stream; `report` says what was seen."""

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self.prompt_tokens = self.new_tokens = self.decode_tokens = self.decode_steps = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.compile_seconds: float | None = None
        self.cold_compile_seconds: float | None = None

    def time_compile(self, shapes: Iterable[str], show: bool) -> None:
        """Drive a warm-up, with a progress bar. The first time for a model is kept beside the compiled code."""
        from tqdm import tqdm

        start = time.perf_counter()
        bar = tqdm(shapes, desc="compiling", unit=" shapes", disable=not show, leave=False)
        for name in bar:
            bar.set_postfix_str(name)
        self.compile_seconds = time.perf_counter() - start
        self.cold_compile_seconds = self._first_time(self.compile_seconds)

    def _first_time(self, seconds: float) -> float:
        """What compiling this took when nothing was cached; remembered beside the compiled code, and lost with it."""
        from runner import compiled_code_dir

        file = compiled_code_dir() / "folio-compile-seconds.json"
        times = json.loads(file.read_text()) if file.exists() else {}
        config = f"{self.engine.model.config} {self.engine.model.dtype} {self.engine.runner.device}"
        key = hashlib.sha256(config.encode()).hexdigest()[:16]
        if key not in times:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(times | {key: seconds}))
        return times.get(key, seconds)

    def watch(self, deltas: "Iterable[Delta]", prompt_tokens: int) -> "Iterator[Delta]":
        """Pass a stream on, noting when its tokens come. Up to the first token is prefill, the rest is decode."""
        start, first, first_step, tokens = time.perf_counter(), None, 0, 0
        for delta in deltas:
            if first is None:
                first, first_step = time.perf_counter(), self.engine.steps
            tokens += len(delta.token_ids)
            yield delta
        end = time.perf_counter()
        first = first or end
        self.decode_steps += self.engine.steps - first_step
        self.prompt_tokens += prompt_tokens
        self.new_tokens += tokens
        self.decode_tokens += max(0, tokens - 1)
        self.prefill_seconds += first - start
        self.decode_seconds += end - first

    def report(self) -> dict[str, Any]:
        from machine import peak_memory, read_bandwidth, threads

        device, model = self.engine.runner.device, self.engine.model
        peak, bandwidth = peak_memory(device), read_bandwidth(device)
        weights = model.weight_bytes_per_token()
        seconds = max(self.decode_seconds, 1e-9)
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.engine.stats().cached_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tokens_per_second": self.prompt_tokens / max(self.prefill_seconds, 1e-9),
            "decode_tokens_per_second": self.decode_tokens / seconds,
            "compile_seconds": self.compile_seconds,
            "cold_compile_seconds": self.cold_compile_seconds,
            "weight_bytes_per_token": weights,
            "read_bandwidth": bandwidth,
            "mbu": weights * self.decode_steps / seconds / bandwidth,
            "peak_memory": peak,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(device),
            "threads": threads(device),
            "breakdown": self.engine.stats().breakdown,
        }


def figures_line(f: dict[str, Any]) -> str:
    """The figures of `report` for people."""
    compiled = ""
    if f["compile_seconds"] is not None:
        compiled = f" | compile {f['compile_seconds']:.1f} s (first time here {f['cold_compile_seconds']:.1f} s)"
    cached = f" ({f['cached_tokens']} cached)" if f["cached_tokens"] else ""
    return (
        f"{f['prompt_tokens']} prompt tokens{cached} at {f['prefill_tokens_per_second']:,.0f}/s | "
        f"{f['new_tokens']} new at {f['decode_tokens_per_second']:,.1f}/s{compiled} | "
        f"{f['weight_bytes_per_token'] / 1e6:,.1f} MB of weights per token, MBU {f['mbu']:.0%} "
        f"of {f['read_bandwidth'] / 1e9:.1f} GB/s | peak memory {f['peak_memory'] / 1e6:,.0f} MB | "
        f"{f['dtype']} on {f['device']}, {f['threads']} threads"
    )


def breakdown_line(breakdown: dict[str, float] | None) -> str:
    """How the time of a step divides, for people."""
    if breakdown is None:
        return "no breakdown: the profiler has seen nothing of the device"
    step = sum(breakdown.values())
    parts = ", ".join(f"{part} {seconds / step:.1%}" for part, seconds in breakdown.items())
    return f"step {step * 1e3:,.2f} ms: {parts}"
