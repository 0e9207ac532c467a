"""A server that runs already and speaks the OpenAI API, as vLLM does: token ids in, token ids out, seen from outside.

    vllm serve FOLDER --dtype float32 --skip-tokenizer-init      # the folder that `bench.peers` names
    python -m bench.peers --vllm http://localhost:8000

It has to say which tokens it has chosen: `return_token_ids`, since vLLM 0.10.2. Threads and cache are its own affair.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from bench.peer_engines import Arrival, Row, Served, Tokens


class Vllm:
    def __init__(self, url: str):
        self.url = url.rstrip("/")
        with urlopen(f"{self.url}/v1/models", timeout=30) as reply:
            self.model = json.load(reply)["data"][0]["id"]

    @classmethod
    def open(cls, folder: Path, rows: Sequence[Row], url: str) -> "Vllm":
        return cls(url)

    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        served = self.serve([Arrival(0.0, prompt, new) for prompt in prompts])
        return [each.tokens for each in served]

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        start = time.perf_counter()
        all_there = threading.Barrier(len(arrivals))
        with ThreadPoolExecutor(len(arrivals)) as threads:
            return list(threads.map(lambda arrival: self._stream(arrival, start, all_there), arrivals))

    def _stream(self, arrival: Arrival, start: float, all_there: threading.Barrier) -> Served:
        all_there.wait()
        time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        served = Served([], [])
        for chunk in self._complete(arrival):
            ids = chunk["choices"][0].get("token_ids")
            if ids is None:
                raise RuntimeError("the server does not say which tokens it chose: it has no `return_token_ids`")
            served.tokens += ids
            served.times += [time.perf_counter() - start] * len(ids)
        return served

    def _complete(self, arrival: Arrival) -> Iterator[dict[str, Any]]:
        """The chunks of one completion."""
        body = {
            "model": self.model,
            "prompt": arrival.prompt,
            "max_tokens": arrival.new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=600) as reply:
            for line in reply:
                data = line.decode().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    chunk = json.loads(data)
                    if chunk.get("choices"):
                        yield chunk
