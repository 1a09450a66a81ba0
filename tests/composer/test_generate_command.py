"""The command ``generate``: text in the order of the prompts, for people and for programs."""

import json
import shutil

import pytest
from rich.control import strip_control_codes

from composer_megatron import cli
from composer_megatron.checkpoint import load_run
from composer_megatron.commands.generate import _show
from composer_megatron.generate import Piece, generate


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    return shutil.copytree(runs["plain"], tmp_path_factory.mktemp("generate") / "run")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        cli.main(["generate", *arguments])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def shown(text: str) -> str:
    """Without what a terminal would obey, which is not printed, and without spaces, some of which are tabs."""
    return "".join(strip_control_codes(text).split())


def test_prints_what_it_writes(capsys, folder):
    asked = (str(folder), "--prompt", "12 Ä", "--prompt", "7", "--max-new-tokens", "6")
    status, out, _ = run(capsys, *asked, "--json")
    found = json.loads(out)
    assert status == 0
    assert [each["prompt"] for each in found] == ["12 Ä", "7"]
    assert json.loads((folder / "samples.json").read_text(encoding="utf-8")) == found
    _, out, _ = run(capsys, *asked)
    places = [shown(out).index(shown(each["prompt"] + each["text"])) for each in found]
    assert places == sorted(places)
    text = found[0]["text"]
    _, out, _ = run(capsys, *asked, "--stop", text[2:4], "--json")
    assert json.loads(out)[0]["text"] == text[: text.index(text[2:4])]


def test_pieces_are_shown_in_the_prompts_order(capsys):
    pieces = [Piece(1, "b"), Piece(0, "a"), Piece(1, "B", "length"), Piece(2, "c"), Piece(0, "A", "stop")]
    assert _show([*pieces, Piece(2, "C", "end of text")], ("1:", "2:", "3:")) == ["aA", "bB", "cC"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip("─ ")]
    assert lines == ["1:aA", "2:bB", "3:cC"]


def test_without_a_number_as_many_tokens_as_fit(capsys, folder):
    """The runs of the tests have sequences of 32 tokens, and 64 is the most that nobody asked for."""
    asked = (str(folder), "--prompt", "12 Ä", "--prompt", "7", "--json")
    status, out, _ = run(capsys, *asked)
    assert status == 0
    with load_run(folder) as loaded:
        tokenizer = loaded.require_tokenizer()
        for each in json.loads(out):
            room = 32 - len(tokenizer.encode(each["prompt"]).ids)
            assert generate(loaded, [each["prompt"]]) == [each["text"]]
            assert generate(loaded, [each["prompt"]], max_new_tokens=room) == [each["text"]]
    status, _, err = run(capsys, *asked, "--max-new-tokens", "64")
    assert status == 2 and "with max_new_tokens=64 more than 32" in err


def test_a_prompt_that_is_refused_is_not_shown(capsys, folder):
    status, out, err = run(capsys, str(folder), "--prompt", "7 " * 200, "--max-new-tokens", "2")
    assert status == 2 and "shorten the prompt" in err
    assert not out.strip()
    status, _, err = run(capsys, str(folder), "--prompt", "7 " * 200)
    assert status == 2 and "shorten the prompt" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompt"),
        (("--prompt", "x", "--stop", ""), "a stop text is empty"),
        (("--prompt", "x", "--top-k", "5"), "give a temperature above 0, such as 0.8, or leave top_k out"),
        (("--prompt", "x", "--top-p", "0.9"), "top_p=0.9 at temperature=0"),
        (("--prompt", "x", "--batch-size", "0", "--max-new-tokens", "2"), "batch_size=0"),
    ],
)
def test_mistakes(capsys, folder, arguments, message):
    status, _, err = run(capsys, str(folder), *arguments)
    assert status == 2
    assert message in err
