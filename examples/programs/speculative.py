"""Speculative calls: three fields of a remote completion in one call, because the text between them can be foreseen.

python server.py &
python -m examples.programs.speculative                 # or, of another server, its URL up to /v1
"""

import sys

from lang import OpenAI, function, gen

SHEET = 'Mia is 7 years old and lives in Oslo.\nJSON: {"name": "Mia", "age": 7, "city": "Oslo"}\n\n'


def fields(s) -> None:
    s += SHEET + "Lea is 31 years old and lives in Paris.\nJSON: "
    s += '{"name": "' + gen("name", max_tokens=16, stop='"') + '", "age": ' + gen("age", max_tokens=8, stop=",")
    s += ', "city": "' + gen("city", max_tokens=16, stop='"') + '"}'


plain = function(fields)
speculative = function(fields, num_api_spec_tokens=48)


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:30000/v1"
    backend = OpenAI("folio-tiny", base_url=url, extras=True)
    for program in (plain, speculative):
        backend.token_usage.reset()
        print(program.run(temperature=0, backend=backend).text().removeprefix(SHEET))
        print(backend.token_usage)
