"""The engine's process as its parent sees it: started, spoken to over a socket pair, and killed.

It is in a session of its own, so that Ctrl-C reaches the parent only. The parent's death ends it, because its socket ends.

    python -m pytest tests/test_server_client.py
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from frames import FRAME
from serving import messages as m

ROOT = Path(__file__).parents[1]
# -P: no module of the current folder is taken for one of ours
COMMAND = [sys.executable, "-P", "-m", "serving.engine_process"]
# On a CPU, PyTorch keeps what oneDNN has prepared for each length of a step that it meets, nearly a megabyte each, and
# unless told otherwise 1,024 of them. This many are enough for the decodes, which come again and again.
ENVIRONMENT = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
MOST_FRAME = 1 << 30  # bytes; what says it is longer is no frame


class Child:
    def __init__(self, process: subprocess.Popen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def start(cls, start: m.Start) -> "Child":
        """A new process, which is loading. Its first message is Ready or Failed."""
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT | os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )
        child = cls(process, *await asyncio.open_connection(sock=ours))
        child.send(start)
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, *messages: m.ToEngine) -> None:
        """Never waits. ValueError for what JSON has no place for. To a process that has gone: nothing happens."""
        frame = m.encode(*messages)
        self._writer.write(FRAME.pack(len(frame)) + frame)

    async def frames(self) -> AsyncIterator[list[m.AnyMessage]]:
        """What it says, until it has gone. ValueError if that makes no sense."""
        try:
            while True:
                (size,) = FRAME.unpack(await self._reader.readexactly(FRAME.size))
                if size > MOST_FRAME:
                    raise ValueError(f"a frame of {size} bytes")
                yield m.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def kill(self) -> None:
        self._process.kill()

    async def wait(self, seconds: float) -> int:
        """Its exit code; it is killed if it does not end by itself in time. Negative: the signal that has ended it."""
        self._writer.close()
        try:
            return await asyncio.to_thread(self._process.wait, seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)
