"""A judge: one branch for each point of view, all at the same time, then a summary of what they say.

The essay stays open in the graph that is printed; the branches depend on nothing but the beginning.

    python -m examples.programs.judge
"""

from engine import Engine
from lang import Backend, function, gen

POINTS = ("the hero", "the place", "the end")


@function
def judge(s, story):
    s += "Here is a story. " + story + "\n"
    forks = s.fork(len(POINTS))
    forks += lambda i: f"What about {POINTS[i]}?" + gen("view", max_tokens=16, temperature=0, stop=["\n", "."])
    for point, fork in zip(POINTS, forks, strict=True):
        s += f"About {point}:" + fork["view"] + ".\n"
    s += "In one sentence:" + gen("verdict", max_tokens=24, temperature=0, stop="\n")


def main(backend: Backend | Engine) -> str:
    return judge.run("A fox lost his red kite. His friend found it, and they were happy.", backend=backend).text()


if __name__ == "__main__":
    print(judge.trace().mermaid())
    print(main(Engine.from_pretrained("assets/folio-tiny")))
