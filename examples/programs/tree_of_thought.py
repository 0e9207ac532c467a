"""Tree of thought (Yao et al., 2023): several beginnings, each judged; the best one is gone on with.

python -m examples.programs.tree_of_thought
"""

from engine import Engine
from lang import Backend, function, gen, select

HEROES = ("rabbit", "fox", "otter")


@function
def best_story(s, place):
    s += f"Once upon a time, there was a house {place}."
    thoughts = s.fork(len(HEROES))
    for thought, hero in zip(thoughts, HEROES, strict=True):
        thought += f" In it lived a {hero} named"
        thought += gen("beginning", max_tokens=24, temperature=0, stop=".")
        with thought.copy() as judge:
            judge += ". What a" + select("verdict", [" good", " sad"]) + " story!"
    marks = [thought.get_meta_info("verdict")[0] for thought in thoughts]
    best = max(range(len(HEROES)), key=lambda i: marks[i]["scores"][0])
    s += f" In it lived a {HEROES[best]} named" + thoughts[best]["beginning"] + "."
    s += gen("rest", max_tokens=40, temperature=0)


def main(backend: Backend | Engine) -> str:
    return best_story.run("near the forest", backend=backend).text()


if __name__ == "__main__":
    print(main(Engine.from_pretrained("assets/folio-tiny")))
