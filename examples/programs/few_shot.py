"""Classification: a few examples, and `select` for the answer. The examples are computed once for all questions.

python -m examples.programs.few_shot
"""

from engine import Engine
from lang import Backend, function, select

EXAMPLES = """\
Text: Thank you, that was so kind!
Mood: happy

Text: I lost my drum and I am all alone.
Mood: sad

Text: What a beautiful day with my friends!
Mood: happy

"""
TEXTS = ["My cake fell down and I had to cry.", "They laughed and danced until the evening.", "The kite is broken."]


@function
def mood(s, text):
    s += EXAMPLES
    s += "Text: " + text + "\nMood:" + select("mood", [" happy", " sad"])


def main(backend: Backend | Engine) -> list[str]:
    states = mood.run_batch([{"text": text} for text in TEXTS], backend=backend)
    return [state["mood"] for state in states]


if __name__ == "__main__":
    print(main(Engine.from_pretrained("assets/folio-tiny")))
