"""What there is to measure: every command in bench/, with the first line of its docstring.

    python -m bench

The list is read from the files (`ast`), and nothing is imported: it is there at once, on any machine. A command is a
file with `if __name__ == "__main__"`; what it needs is said by what it imports, and by its docstring.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
FIRST = "ceilings"  # the denominators of all others


@dataclass(frozen=True)
class Command:
    name: str
    about: str  # the first line of the docstring
    needs: str


def commands(folder: Path = FOLDER) -> list[Command]:
    """Every module of the folder that can be run: the ceilings, then the rest by name."""
    found = []
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stem != "__main__" and is_command(tree):
            docstring = ast.get_docstring(tree) or ""
            found.append(Command(path.stem, docstring.partition("\n")[0], needs(tree, docstring)))
    return sorted(found, key=lambda command: (command.name != FIRST, command.name))


def extra() -> set[str]:
    """The packages of the `bench` extra of pyproject.toml."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.match(r"[\w-]+", wanted)[0] for wanted in project["optional-dependencies"]["bench"]}


def is_command(tree: ast.Module) -> bool:
    """Does it have an `if __name__ == "__main__"`?"""
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)


def needs(tree: ast.Module, docstring: str) -> str:
    """The extra, if anything of it is imported; a GPU, if the first line says so, or if there is a flag for one."""
    words = ["[bench]"] if extra() & set(imported(tree)) else []
    if "on a GPU" in docstring.partition("\n")[0]:
        words.append("GPU")
    elif "--gpu " in docstring:
        words.append("GPU for --gpu")
    return ", ".join(words)


def imported(tree: ast.Module) -> Iterator[str]:
    """The top-level packages that a module imports, its functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def main() -> None:
    lines = [(f"python -m bench.{command.name}", command.needs or "-", command.about) for command in commands()]
    wide, wider = (max(len(line[i]) for line in lines) for i in (0, 1))
    print(f"{'command':{wide}}  {'needs':{wider}}  what it measures")
    for command, needed, about in lines:
        print(f"{command:{wide}}  {needed:{wider}}  {about}")
    print('\n[bench]: pip install -e ".[bench]"')


if __name__ == "__main__":
    main()
