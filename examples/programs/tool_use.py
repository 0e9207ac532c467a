"""Tools: the model chooses one and fills it in, Python does the work, and the model goes on from there.

python -m examples.programs.tool_use
"""

from engine import Engine
from lang import Backend, function, gen, select


@function
def answer(s, question):
    s += "To answer this question: " + question + "\nI need to use a"
    s += select("tool", [" calculator", " search engine"]) + ".\n"
    if s["tool"] == " calculator":
        s += (
            "The sum is "
            + gen("sum", max_tokens=10, temperature=0, regex=r"[0-9]{1,2} \+ [0-9]{1,2}")
            + ", which makes "
        )
        s += str(sum(int(number) for number in s["sum"].split("+")))
    else:
        s += "The word to search is" + gen("word", max_tokens=6, temperature=0, stop="\n")


def main(backend: Backend | Engine) -> str:
    return answer.run("What is 27 + 58?", backend=backend).text()


if __name__ == "__main__":
    print(main(Engine.from_pretrained("assets/folio-tiny")))
