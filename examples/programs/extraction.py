"""Extraction: the answer is an object of a schema, whatever the model would like to say.

python -m examples.programs.extraction
"""

import json
from typing import Any

from engine import Engine
from lang import Backend, assistant, function, gen, user

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@function
def extract(s, text):
    s += user("Extract the name, age and city as JSON: " + text)
    s += assistant(gen("person", max_tokens=60, temperature=0, json_schema=PERSON))


def main(backend: Backend | Engine) -> list[dict[str, Any]]:
    texts = ["Mia is 7 years old and lives in Oslo.", "At the age of 41, Marco moved to Baku."]
    states = extract.run_batch([{"text": text} for text in texts], backend=backend)
    return [json.loads(state["person"]) for state in states]


if __name__ == "__main__":
    print(main(Engine.from_pretrained("assets/folio-tiny")))
