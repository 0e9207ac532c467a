"""A process of its own for each peer, so that their libraries and their thread pools never meet.

The benchmark writes one JSON line to the worker's stdin, the worker answers with one on its stdout, until stdin ends:

    {"do": "open", "engine": [".folio", "Folio"], "folder": "...", "rows": [{...}], "options": {...}}
    {"ok": {"serves": true}, "seconds": 1.2}
    {"do": "generate", "prompts": [[...]], "new": 8, "row": {...}}
    {"ok": [[...]], "seconds": 0.3}
    {"do": "serve", "arrivals": [{"at": 0.1, "prompt": [...], "new": 8}]}
    {"ok": [{"tokens": [...], "times": [...]}], "seconds": 0.9}
    {"error": "..."}                                                                 what cannot be done

The worker takes the time around its engine's call, so the pipe costs nothing. Whatever a library prints goes to a log.
While one works, the others wait for a line, and their threads sleep: OpenMP's spin for some ms after their last work
(Intel's for 200), which `Worker.call` waits for, and `Worker.cpu_seconds` tells who did not keep still.

    python -m bench.peer_engines.worker        # what Worker starts
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.peer_engines import Arrival, Row, Served, Tokens

ENGINES = {  # name -> module (of this package, with the dot), class, options of its `open`
    "folio": (".folio", "Folio", {"compiled": False}),
    "folio-compiled": (".folio", "Folio", {"compiled": True}),
    "hf": (".hf", "Generate", {"static": False, "frozen": False}),
    "hf-compiled": (".hf", "Generate", {"static": True, "frozen": False}),
    "hf-batching": (".hf", "ContinuousBatching", {}),
    "llama.cpp": (".llama_cpp", "LlamaCpp", {"flash": False}),
    "llama.cpp-flash": (".llama_cpp", "LlamaCpp", {"flash": True}),
    "openvino": (".openvino", "OpenVino", {}),
    "gpt-fast": (".gpt_fast", "GptFast", {}),
    "vllm": (".vllm", "Vllm", {}),
}
ROOT = Path(__file__).parents[2]
SETTLE = 0.3  # seconds until the threads of all others sleep
PATIENCE = 3600.0  # seconds; who answers nothing for longer is ended


class PeerFailed(Exception):
    """A peer could not do what it was asked for; the text says why."""


class Worker:
    """The benchmark's end. A Generator, and a Server if its engine is one; PeerFailed whatever goes wrong over there.

    `seconds` is how long the last call took, by the worker's own clock.
    """

    def __init__(
        self, name: str, folder: Path, rows: Sequence[Row], threads: int, options: dict[str, Any] | None = None
    ):
        self.name, self.seconds = name, 0.0
        module, kind, fixed = ENGINES[name]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.peer_engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd=ROOT,
            text=True,
        )
        try:
            facts = self.call(
                "open",
                engine=[module, kind],
                folder=str(folder),
                rows=[asdict(row) for row in rows],
                options=fixed | (options or {}),
            )
        except BaseException:
            self.close()
            raise
        self.serves = facts["serves"]

    def generate(self, prompts: Tokens, new: int, row: Row) -> Tokens:
        return self.call("generate", prompts=prompts, new=new, row=asdict(row))

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        return [Served(**each) for each in self.call("serve", arrivals=[asdict(arrival) for arrival in arrivals])]

    def call(self, do: str, **what: Any) -> Any:
        time.sleep(SETTLE)
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do} | what) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            raise PeerFailed(f"its process ended with {self._process.wait()}: {self._last_words()}")
        reply = json.loads(answer)
        if "error" in reply:
            raise PeerFailed(reply["error"])
        self.seconds = reply["seconds"]
        return reply["ok"]

    def cpu_seconds(self) -> float:
        """CPU time that the process has used so far; 0 where there is no /proc."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


# ---- the worker's end


def do(engine: Any, request: dict[str, Any]) -> Any:
    """Anything but "open"."""
    if request["do"] == "generate":
        return engine.generate(request["prompts"], request["new"], Row(**request["row"]))
    served = engine.serve([Arrival(**arrival) for arrival in request["arrivals"]])
    return [asdict(each) for each in served]


def open_engine(request: dict[str, Any]) -> Any:
    module, kind = request["engine"]
    engine = getattr(import_module(module, "bench.peer_engines"), kind)
    return engine.open(Path(request["folder"]), [Row(**row) for row in request["rows"]], **request["options"])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    engine = None
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        try:
            if request["do"] == "open":
                engine = open_engine(request)
                result = {"serves": hasattr(engine, "serve")}
            else:
                result = do(engine, request)
            reply = {"ok": result, "seconds": time.perf_counter() - start}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)
    os._exit(0)  # a library's threads may not know that it is over


if __name__ == "__main__":
    main()
