"""A server that runs: `python server.py` on a free port, with the bundled model.

with running("--api-key", "secret") as server:
    httpx.get(server.url + "/health")
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from waiting import HANG, until

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "assets" / "folio-tiny"


@dataclass
class Server:
    process: subprocess.Popen
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        found = re.search(r"running on (http://[\d.]+:\d+)", "".join(self.log))
        return found and found[1]

    def read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)

    def stop(self, sign: int = signal.SIGINT) -> int:
        self.process.send_signal(sign)
        return self.process.wait(HANG)


@contextmanager
def running(*flags: str) -> Iterator[Server]:
    """Started, and stopped in the end, whatever happens."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "server.py"), "--port", "0", "--dtype", "float32", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    server = Server(process)
    reader = threading.Thread(target=server.read, daemon=True)
    reader.start()
    try:
        until(lambda: server.url or process.poll() is not None)
        assert server.url, "".join(server.log)
        yield server
    finally:
        if process.poll() is None:
            server.stop()
        reader.join(5)
        process.stderr.close()
