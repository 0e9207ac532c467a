"""llama.cpp, through the C functions that llama-cpp-python passes on: one context, its sequences decoded together.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf     # builds it for this processor

Weights and cache are float32, as everybody's here. Its flash attention is less exact on a CPU all the same, which now
and then is another token; so it is off, and "llama.cpp-flash" is the one that has it. Prompts go in as one batch, cut
into pieces of `n_batch` tokens, with logits for the last token of each only. The library can give a sequence another's
prefix (`llama_memory_seq_cp`), but who shares what is for its caller to know: here the caller does know, and what all
prompts begin with is computed once. For that the sequences must be in one buffer (`kv_unified`).
"""

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import llama_cpp as llama
import numpy as np

from bench.peer_engines import Row, Tokens, shared_prefix
from bench.peer_engines.gguf_file import write_gguf

Entry = tuple[int, int, int, bool]  # token, position, sequence, are its logits wanted?


class LlamaCpp:
    def __init__(self, path: Path, threads: int, flash: bool):
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.threads, self.flash, self.context, self.row = threads, flash, None, None

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row], threads: int, flash: bool) -> "LlamaCpp":
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            write_gguf(folder, path)
            return cls(path, threads, flash)  # it maps the file, which lives as long as the mapping

    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        self._make_room(row)
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        outputs: Tokens = [[] for _ in prompts]
        same = self._share(prompts)
        entries = [
            (token, position, i, position == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
            if position >= same
        ]
        for _ in range(new):
            for i, token in self._decode(entries):
                outputs[i].append(token)
            entries = [
                (output[-1], len(prompt) + len(output) - 1, i, True)
                for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
            ]
        return outputs

    def _share(self, prompts: Tokens) -> int:
        """Compute what all prompts begin with, once, for all sequences. -> how many tokens that is."""
        same = shared_prefix(prompts) if self.unified else 0
        self._decode([(token, position, 0, False) for position, token in enumerate(prompts[0][:same])])
        for sequence in range(1, len(prompts) if same else 0):
            llama.llama_memory_seq_cp(llama.llama_get_memory(self.context), 0, sequence, 0, same)
        return same

    def _make_room(self, row: Row) -> None:
        """A context of the row's size: kept until another row comes."""
        if row == self.row:
            return
        if self.context is not None:
            llama.llama_free(self.context)
        params = llama.llama_context_default_params()
        room = -(-row.longest // 256) * 256  # of each sequence; it would round up itself
        params.n_ctx, params.n_seq_max = row.batch * room, row.batch
        params.n_batch, params.n_ubatch = 2048, 512
        params.kv_unified = self.unified = row.name == "shared"
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context, self.row = llama.llama_init_from_model(self.model, params), row
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.batch = llama.llama_batch_init(params.n_batch, 0, 1)
        self.n_batch = params.n_batch

    def _decode(self, entries: Sequence[Entry]) -> list[tuple[int, int]]:
        """-> sequence and next token of every entry that wants logits."""
        chosen: list[tuple[int, int]] = []
        left = iter(entries)
        while piece := list(islice(left, self.n_batch)):
            batch = self.batch
            batch.n_tokens = len(piece)
            for k, (token, position, sequence, wanted) in enumerate(piece):
                batch.token[k], batch.pos[k], batch.logits[k] = token, position, wanted
                batch.n_seq_id[k], batch.seq_id[k][0] = 1, sequence
            if status := llama.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode returns {status}")
            wanting = [sequence for _, _, sequence, wanted in piece if wanted]
            if wanting:
                logits = np.ctypeslib.as_array(llama.llama_get_logits(self.context), (len(wanting), self.vocab))
                chosen += zip(wanting, logits.argmax(-1).tolist(), strict=True)
        return chosen
