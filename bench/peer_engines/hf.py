"""transformers: generate() with its dynamic cache, with a static one and torch.compile, and its continuous batching.

pip install transformers
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.peer_engines import PAGE, Arrival, Row, Served, Tokens


def load_peer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None  # exact number of tokens
    return model


class Generate:
    """The eager and the compiled one can share a model; a frozen one keeps its own compiled call."""

    def __init__(self, model: Any, static: bool, frozen: bool):
        from transformers import CompileConfig

        self.model, self.static, self.frozen = model, static, frozen
        # Its own default, "reduce-overhead", is CUDA graphs. With dynamic=False no size of the first row outlives it.
        # That the frozen one has options of its own also keeps Dynamo from handing it the graph of the other.
        mode = dict(mode=None, options={"freezing": True}) if frozen else dict(mode="default")
        self.compile_config = CompileConfig(dynamic=False, **mode)
        self.compile_config._compile_all_devices = True  # else generate() leaves a CPU eager, without a word
        self.caches: dict[Row, Any] = {}
        torch._dynamo.config.recompile_limit = 64  # one graph for each row of each engine

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row], static: bool, frozen: bool) -> "Generate":
        return cls(load_peer(folder), static, frozen)

    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        from torch._inductor import config as inductor

        ids = torch.tensor(prompts)
        options = self._static_options(row) if self.static else {}
        with inductor.patch(freezing=True) if self.frozen else nullcontext():
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options
            )
        return output[:, ids.shape[1] :].tolist()

    def _static_options(self, row: Row) -> dict[str, Any]:
        """A cache for each row, used again and again.

        `cache_implementation="static"` would make all caches as long as the longest so far, and a new one each time,
        which a frozen graph does not notice: it holds on to the memory of the first.
        """
        from transformers import StaticCache

        if row not in self.caches:
            self.caches[row] = StaticCache(self.model.config, max_cache_len=row.longest)
        self.caches[row].reset()
        return dict(past_key_values=self.caches[row], compile_config=self.compile_config)


class ContinuousBatching:
    """Its serving loop: paged cache, prefixes shared, prompts and decodes in one step; eager, for a CPU."""

    def __init__(self, model: Any, rows: Sequence[Row]):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        tokens = max(row.batch * row.longest for row in rows)
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=2 * max(row.batch * -(-row.longest // PAGE) for row in rows),
            max_batch_tokens=min(tokens, 2048),
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,
        )
        self.manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=config,
        )
        self.manager.start()

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row]) -> "ContinuousBatching":
        return cls(load_peer(folder), rows)

    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        ids = self.manager.add_requests(prompts, max_new_tokens=new)
        return [output.generated_tokens for output in self._wait_for(ids)]

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        start, ids = time.perf_counter(), []
        for arrival in arrivals:
            time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            ids.append(self.manager.add_request(arrival.prompt, max_new_tokens=arrival.new, record_timestamps=True))
        outputs = self._wait_for(ids)
        return [Served(output.generated_tokens, [t - start for t in output.timestamps]) for output in outputs]

    def _wait_for(self, ids: Sequence[str]) -> list[Any]:
        done: dict[str, Any] = {}
        while len(done) < len(ids):
            output = self.manager.get_result(timeout=1)
            if output is None:
                if not self.manager.is_running():
                    raise RuntimeError("its loop has ended before the requests have")
            elif output.error is not None:
                raise RuntimeError(output.error)
            elif output.is_finished():
                done[output.request_id] = output
        return [done[id] for id in ids]
