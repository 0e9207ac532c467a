"""Streaming: one variable of a program as it comes, while the rest is made in the background.

python -m examples.programs.streaming
"""

from collections.abc import Iterator

from engine import Engine
from lang import Backend, assistant, function, gen, user


@function
def talk(s):
    s += user("My name is Mia.")
    s += assistant(gen("greeting", max_tokens=20, temperature=0))
    s += user("Tell me a story.")
    s += assistant(gen("story", max_tokens=60, temperature=0))


def pieces(backend: Backend | Engine) -> Iterator[str]:
    return talk.run(stream=True, backend=backend).text_iter("story")


def main(backend: Backend | Engine) -> str:
    return "".join(pieces(backend))


if __name__ == "__main__":
    for piece in pieces(Engine.from_pretrained("assets/folio-tiny")):
        print(piece, end="", flush=True)
    print()
