"""docs/export.md: its commands run one after the other, its Python runs, and what it shows is what is printed."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils  # noqa: E402

from composer_megatron import cli  # noqa: E402

torch.set_num_threads(1)

PAGE = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")


FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for name, text in FENCED if name == language]


def test_the_page(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(runs["plain"], "runs/composite")
    widths = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**widths, num_hidden_layers=4)).save_pretrained("llama")
    said = ""
    for command in "".join(blocks("bash")).splitlines():
        program, *arguments = shlex.split(command)
        assert program == "composer-megatron"
        cli.main(arguments)
        said += capsys.readouterr().out
        assert Path(arguments[2]).is_dir()
    shown = next(block for block in blocks("") if block.startswith("map:"))
    printed = said[said.index("map: A:0-3") :]
    assert [line.split() for line in printed.splitlines()][: len(shown.splitlines())] == [
        line.split() for line in shown.splitlines()
    ]
    names: dict = {}
    for code in blocks("python"):
        exec(code, names)
    assert [text[: len(prompt)] for text, prompt in zip(names["texts"], ("def ", "class Stack:"), strict=True)] == [
        "def ",
        "class Stack:",
    ]
