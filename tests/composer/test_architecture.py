"""Exact counts against published sizes and a count by hand, and the file that stages hand over."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS, load_shape

parse = CompositeSequence.parse


@pytest.mark.parametrize(
    ("shape", "total"),
    # Safetensors sizes of the Hugging Face models: Llama 3.2 1B and 3B, Llama 3.1 8B.
    [("1b", 1_235_814_400), ("3b", 3_212_749_824), ("8b", 8_030_261_248)],
)
def test_baselines_have_llamas_parameters(shape: str, total: int) -> None:
    assert Architecture(parse("A"), load_shape(shape)).baseline().params_total == total


def causal_flops(sequence: CompositeSequence, name: str, seq_len: int) -> int:
    """Multiply-adds of one sequence counted product by product, forward times three, over its tokens."""
    shape = PRESETS[name]
    d, hd = shape.hidden_size, shape.head_dim
    forward = 0
    for position in range(1, seq_len + 1):
        for letter in sequence:
            if letter == "A":
                for out in (shape.num_attention_heads, shape.num_query_groups, shape.num_query_groups):
                    forward += 2 * d * out * hd
                forward += 2 * shape.num_attention_heads * hd * d
                forward += 2 * (2 * shape.num_attention_heads * hd * position)
            else:
                forward += 3 * (2 * d * shape.ffn_hidden_size)
        forward += 2 * d * shape.vocab_size
    assert 3 * forward % seq_len == 0
    return 3 * forward // seq_len


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("text", ["A", "M", "2A4M", "7M1A"])
@pytest.mark.parametrize("name", ["tiny", "1b"])
def test_flops_by_hand(name: str, text: str, seq_len: int) -> None:
    sequence = parse(text)
    assert Architecture(sequence, PRESETS[name]).flops_per_token(seq_len) == causal_flops(sequence, name, seq_len)


@pytest.mark.parametrize(
    ("seq_len", "ratio"),
    [(4096, 1.024), (8192, 1.064), (32768, 1.237)],  # reference tables, three decimals
)
def test_flops_ratio_of_stacked_1b(seq_len: int, ratio: float) -> None:
    summary = Architecture(parse("(2A4M)x4+1A2M"), PRESETS["1b"]).summary(seq_len)
    assert summary["flops_ratio"] == pytest.approx(ratio, abs=5e-4)


def test_kv_cache_of_llama_1b_is_32_kib_a_token() -> None:
    baseline = Architecture(parse("A"), PRESETS["1b"]).baseline()
    assert baseline.kv_bytes_per_token() == 32 * 1024
    assert baseline.kv_bytes_per_token(bytes_per_element=4) == 64 * 1024


@given(st.text(alphabet="AM", min_size=1, max_size=30), st.sampled_from(sorted(PRESETS)), st.integers(1, 9000))
def test_counts_add_up_block_by_block(letters: str, name: str, seq_len: int) -> None:
    shape = PRESETS[name]
    whole = Architecture(CompositeSequence(letters), shape)
    single = {letter: Architecture(CompositeSequence(letter), shape) for letter in "AM"}
    assert whole.matrix_parameters == sum(single[letter].matrix_parameters for letter in letters)
    norms = shape.hidden_size * (len(letters) + 1)
    assert whole.params_non_embedding == whole.matrix_parameters + norms
    assert whole.params_total - whole.params_non_embedding == whole.embedding_parameters
    assert whole.kv_bytes_per_token() == sum(single[letter].kv_bytes_per_token() for letter in letters)
    head = 6 * shape.vocab_size * shape.hidden_size
    blocks = sum(single[letter].flops_per_token(seq_len) - head for letter in letters)
    assert whole.flops_per_token(seq_len) == blocks + head


def test_summary_of_a_model_without_attention_has_no_kv_ratio() -> None:
    summary = Architecture(parse("3M"), PRESETS["tiny"]).summary(128)
    assert summary["kv_bytes_per_token"] == 0
    assert summary["kv_ratio"] is None
    json.dumps(summary)


@given(st.text(alphabet="AM", min_size=8, max_size=40), st.sampled_from(["tiny", "demo", "1b"]))
def test_matched_baseline_is_as_close_as_a_step_allows(letters: str, name: str) -> None:
    model = Architecture(CompositeSequence(letters), PRESETS[name])
    matched = model.matched_baseline()
    assert matched.sequence == model.baseline().sequence
    shape = matched.shape
    assert shape.ffn_hidden_size % 8 == 0
    step = 8 * 3 * shape.hidden_size * shape.baseline_pairs
    difference = abs(matched.matrix_parameters - model.matrix_parameters)
    assert difference <= step / 2 or shape.ffn_hidden_size == 8
    assert matched.embedding_parameters == model.embedding_parameters
    same = Architecture(CompositeSequence("AM" * shape.baseline_pairs), PRESETS[name])
    assert same.matched_baseline() == same


def test_seq_len_must_be_positive() -> None:
    with pytest.raises(UsageError, match="seq_len=0"):
        Architecture(parse("A"), PRESETS["tiny"]).flops_per_token(0)


@given(st.text(alphabet="AM", min_size=1, max_size=30), st.sampled_from(sorted(PRESETS)))
def test_file_round_trip(tmp_path_factory: pytest.TempPathFactory, letters: str, name: str) -> None:
    path = tmp_path_factory.mktemp("files") / "architecture.json"
    architecture = Architecture(CompositeSequence(letters), PRESETS[name], {"method": "by hand"})
    architecture.save(path)
    loaded = Architecture.load(path)
    assert loaded == architecture
    assert loaded.origin == architecture.origin


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "not an architecture file"),
        ({"version": 99}, "version 99"),
        ({"sequence": "2A4X"}, "unknown primitive 'X'"),
        ({"sequence": 5}, "expected a sequence"),
        ({"shape": {"hidden_size": 3}}, "its shape"),
        ({"shape": None}, "expected a sequence"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "architecture.json"
    Architecture(parse("2A4M"), PRESETS["tiny"]).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError) as caught:
        Architecture.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "\x00\xff"])
def test_torn_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "architecture.json"
    path.write_text(text)
    with pytest.raises(FileError, match=r"architecture\.json"):
        Architecture.load(path)
    with pytest.raises(FileError, match="no file"):
        Architecture.load(tmp_path / "absent.json")
