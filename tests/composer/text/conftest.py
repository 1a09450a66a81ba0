"""A text folder to read, check and damage."""

import json
import shutil
from pathlib import Path

import pytest

from composer_megatron.text.preprocess import preprocess


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sound one, which no test may change."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(30)))
    return preprocess([folder / "a.jsonl"], folder / "text", vocab_size=260, workers=1).folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "text"))
