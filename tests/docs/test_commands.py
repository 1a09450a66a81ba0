"""Every command that a page shows is one that the program takes: each is read by its parser, and none is run."""

import functools
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from composer_megatron import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LEFT_OUT = re.compile("[…→]")
"""An ellipsis marks arguments of the reader's own, an arrow a way through several commands."""


def shown(page: Path) -> list[str]:
    """The commands of code blocks, and of running text where they have an option."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line.startswith("composer-megatron")]
    inline = [code.replace("\n", " ") for code in re.findall(r"(?<!`)`(composer-megatron [^`]*)`(?!`)", text)]
    return [line for line in [*lines, *(code for code in inline if "--" in code)] if not LEFT_OUT.search(line)]


def program(line: str) -> list[str]:
    """The program's own arguments: no comment, no pipe, no redirection, no brackets round what may be left out."""
    words = shlex.split(line, comments=True)
    ends = [index for index, word in enumerate(words) if word[0] in "|>"]
    return [word.strip("[]") for word in words[1 : min(ends, default=len(words))]]


COMMANDS = [(page.name, line) for page in PAGES for line in shown(page)]


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """Names of the commands that were parsed; none of them does anything."""
    names: list[str] = []

    def recorded(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def record(*_: object, **__: object) -> None:
            names.append(command.__name__)

        return record

    monkeypatch.setattr(cli, "COMMANDS", tuple(recorded(command) for command in cli.COMMANDS))
    return names


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line}"[:90] for page, line in COMMANDS])
def test_the_program_takes_what_the_page_shows(page, line, parsed):
    cli.main(program(line))
    assert len(parsed) == 1, f"{page}: {line}"


def test_pages_show_commands():
    assert {"README.md", "training.md", "search.md", "pipelines.md", "evidence.md"} <= {page for page, _ in COMMANDS}


def test_a_wrong_command_on_a_page_would_be_found(parsed):
    with pytest.raises(SystemExit):
        cli.main(program("composer-megatron plan 2A4M --shapes 1b"))
    assert parsed == []
