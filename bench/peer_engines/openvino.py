"""OpenVINO GenAI: its continuous batching pipeline, in float32, weights and cache.

    pip install openvino openvino-genai

Its prefix cache knows what earlier requests have computed, not what one beside it is computing. So where all prompts begin
alike, the others are added when the first has its first token.

Left alone it would compute in bfloat16 where the processor can, and keep its cache in 8 bits. The model comes from
openvino_graph.py: optimum-intel, the usual way, wants a transformers of its own.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from bench.peer_engines import Arrival, Row, Served, Tokens, shared_prefix
from bench.peer_engines.openvino_graph import build_graph

NO_TOKEN = 2**31 - 1  # it wants an end-of-sequence token, though it is to ignore it


class OpenVino:
    def __init__(self, model: Path, rows: Sequence[Row], threads: int):
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = max(row.batch for row in rows)
        scheduler.enable_prefix_caching = True
        properties = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "INFERENCE_NUM_THREADS": threads,
        }
        self.pipeline = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self.requests = 0

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row], threads: int) -> "OpenVino":
        with tempfile.TemporaryDirectory() as scratch:
            ov.save_model(build_graph(folder), Path(scratch) / "openvino_model.xml", compress_to_fp16=False)
            return cls(Path(scratch), rows, threads)

    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        arrivals = [Arrival(0.0, prompt, new) for prompt in prompts]
        return [served.tokens for served in self.serve(arrivals, first_alone=shared_prefix(prompts) > 0)]

    def serve(self, arrivals: Sequence[Arrival], first_alone: bool = False) -> list[Served]:
        """first_alone: the others come when the first has its first token, whatever their `at`."""
        start, waiting = time.perf_counter(), list(arrivals)[::-1]
        running: list[tuple[Any, Served]] = []
        while waiting or self.pipeline.has_non_finished_requests():
            now = time.perf_counter() - start
            while waiting and waiting[-1].at <= now and not (first_alone and running and not running[0][1].tokens):
                running.append((self._add(waiting.pop()), Served([], [])))
            if not self.pipeline.has_non_finished_requests():
                time.sleep(max(0.0, waiting[-1].at - now))
                continue
            self.pipeline.step()
            now = time.perf_counter() - start
            for handle, served in running:
                while handle.can_read():
                    for output in handle.read().values():
                        served.tokens += output.generated_ids
                        served.times += [now] * len(output.generated_ids)
        return [served for _, served in running]

    def _add(self, arrival: Arrival) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = arrival.new, True, False
        config.set_eos_token_id(NO_TOKEN)
        self.requests += 1
        return self.pipeline.add_request(self.requests, ov.Tensor(np.array([arrival.prompt], dtype=np.int64)), config)
