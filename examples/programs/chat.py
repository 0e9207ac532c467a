"""A chat of several turns: each question finds all that was said before it in the cache.

python -m examples.programs.chat
"""

from engine import Engine
from lang import Backend, assistant, function, gen, system, user


@function
def talk(s, questions):
    s += system("You are a helpful assistant.")
    for i, question in enumerate(questions):
        s += user(question)
        s += assistant(gen(f"answer_{i}", max_tokens=40, temperature=0))


def main(backend: Backend | Engine) -> list[dict[str, str]]:
    return talk.run(["My name is Mia.", "What is 27 + 58?", "What is my name?"], backend=backend).messages()


if __name__ == "__main__":
    for message in main(Engine.from_pretrained("assets/folio-tiny")):
        print(f"{message['role']}: {message['content']}")
