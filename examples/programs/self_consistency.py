"""Self-consistency (Wang et al., 2022): the same question several times, and the answer that comes most often.

python -m examples.programs.self_consistency
"""

from collections import Counter

from engine import Engine
from lang import Backend, assistant, function, gen, user


@function
def sum_of(s, question, branches):
    s += user(question)
    forks = s.fork(branches)
    forks += lambda i: assistant(gen("answer", max_tokens=8, temperature=0.8, seed=i))
    forks.join()


def main(backend: Backend | Engine) -> tuple[str, list[str]]:
    state = sum_of.run(question="What is 27 + 58?", branches=8, backend=backend)
    [(answer, _)] = Counter(state["answer"]).most_common(1)
    return answer, state["answer"]


if __name__ == "__main__":
    print(main(Engine.from_pretrained("assets/folio-tiny")))
