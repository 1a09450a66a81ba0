"""Shapes: the presets' published widths, JSON in and out, and every way to get one wrong."""

import dataclasses
import json
from pathlib import Path

import pytest

from composer_megatron.errors import FileError, ShapeError
from composer_megatron.shape import PRESETS, Shape, load_shape


@pytest.mark.parametrize(
    ("name", "widths", "pairs", "tied"),
    [
        ("350m", (1536, 4096, 24, 8, 64), 14, True),
        ("1b", (2048, 8192, 32, 8, 64), 16, True),
        ("3b", (3072, 8192, 24, 8, 128), 28, True),
        ("8b", (4096, 14336, 32, 8, 128), 32, False),
        ("70b", (8192, 28672, 64, 8, 128), 80, False),
    ],
)
def test_published_presets(name: str, widths: tuple[int, ...], pairs: int, tied: bool) -> None:
    shape = load_shape(name)
    found = (
        shape.hidden_size,
        shape.ffn_hidden_size,
        shape.num_attention_heads,
        shape.num_query_groups,
        shape.head_dim,
    )
    assert found == widths
    assert (shape.baseline_pairs, shape.tied_embeddings, shape.vocab_size) == (pairs, tied, 128_256)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str, tmp_path: Path) -> None:
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(PRESETS[name].as_dict()))
    assert load_shape(str(path)) == PRESETS[name]


def test_files_say_nothing_of_a_scaling_that_is_not_there() -> None:
    assert "rope_scaling_factor" not in PRESETS["1b"].as_dict()
    scaled = dataclasses.replace(PRESETS["1b"], rope_scaling_factor=32.0)
    assert scaled.as_dict()["rope_scaling_factor"] == 32
    assert Shape.from_dict(scaled.as_dict()) == scaled != PRESETS["1b"]


def test_head_dim_follows_from_the_heads() -> None:
    values = PRESETS["1b"].as_dict()
    del values["head_dim"]
    assert Shape.from_dict(values).head_dim == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_query_groups": 5}, "divisor of num_attention_heads=32"),
        ({"head_dim": 63}, "even"),
        ({"hidden_size": 0}, "at least 1"),
        ({"hidden_size": 2048.5}, "whole number"),
        ({"ffn_hidden_size": True}, "whole number"),
        ({"tied_embeddings": 1}, "true or false"),
        ({"norm_epsilon": -1.0}, "positive"),
        ({"rope_scaling_factor": 0.5}, "at least 1"),
        ({"rope_scaling_factor": float("inf")}, "at least 1"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"zzzz": 3}, "known fields"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        Shape.from_dict(PRESETS["1b"].as_dict() | change)
    assert words in str(caught.value)
    assert next(iter(change)) in str(caught.value)


def test_heads_that_do_not_divide() -> None:
    values = PRESETS["1b"].as_dict() | {"num_attention_heads": 24}
    del values["head_dim"]
    with pytest.raises(ShapeError, match="num_attention_heads=24 does not divide hidden_size=2048"):
        Shape.from_dict(values)


def test_missing_fields_and_files(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"missing.*ffn_hidden_size"):
        Shape.from_dict({"hidden_size": 64, "num_attention_heads": 4})
    with pytest.raises(ShapeError, match="needs hidden_size"):
        Shape.from_dict({})
    with pytest.raises(ShapeError, match=r"did you mean '8b'"):
        load_shape("8B")
    with pytest.raises(FileError, match="no file"):
        load_shape(str(tmp_path / "absent.json"))
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(FileError, match="line 1"):
        load_shape(str(tmp_path / "torn.json"))


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["1b"].hidden_size = 3  # type: ignore[misc]
