"""Messages over a pipe, each behind its length: how the processes of Folio talk.

    write_frame(pipe, b"...")
    content = read_frame(pipe)

What is inside is JSON, or bytes with a letter in front; never a pickle, which would run what it says.
"""

import struct
from typing import BinaryIO

FRAME = struct.Struct(">Q")  # how many bytes follow


def write_frame(pipe: BinaryIO, content: bytes) -> None:
    pipe.write(FRAME.pack(len(content)))
    pipe.write(content)
    pipe.flush()


def read_frame(pipe: BinaryIO) -> bytes:
    """EOFError if the other side has gone."""
    return _read(pipe, *FRAME.unpack(_read(pipe, FRAME.size)))


def _read(pipe: BinaryIO, size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content
