"""Safetensors written piece by piece are what the safetensors package reads; our names and theirs are one to one."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError
from composer_megatron.huggingface.names import composite_parts, llama_parts
from composer_megatron.huggingface.write import Piece, write_safetensors
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

safetensors = pytest.importorskip("safetensors.torch", reason='needs pip install "composer-megatron[train]"')

torch.set_num_threads(1)


def pieces(tensors: list[list[torch.Tensor]]) -> list[Piece]:
    return [
        Piece(
            {f"é.{number}.{index}": tuple(value.shape) for index, value in enumerate(group)}, lambda group=group: group
        )
        for number, group in enumerate(tensors)
    ]


def drawn(sizes: list[list[list[int]]]) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(size, generator=generator) for size in group] for group in sizes]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard_bytes=st.integers(1, 400),
)
def test_the_package_reads_what_is_written(tmp_path_factory, sizes, dtype, shard_bytes):
    folder, tensors, told = tmp_path_factory.mktemp("written"), drawn(sizes), []
    given_pieces = pieces(tensors)
    write_safetensors(
        folder, given_pieces, dtype, shard_bytes=shard_bytes, progress=lambda done, total: told.append((done, total))
    )
    files = {path.name: safetensors.load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    assert all(int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0 for path in folder.glob("*.safetensors"))
    found = {name: value for file in files.values() for name, value in file.items()}
    wanted = {name: value for piece in given_pieces for name, value in zip(piece.sizes, piece.make(), strict=True)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value.to(dtype))
    total = sum(value.numel() for value in wanted.values()) * dtype.itemsize
    assert told[-1] == (total, total)
    for file in files.values():
        whole = [piece for piece in given_pieces if piece.sizes.keys() <= file.keys()]
        assert {name for piece in whole for name in piece.sizes} == file.keys()  # no piece was torn
        assert len(whole) == 1 or sum(value.nbytes for value in file.values()) <= shard_bytes
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"] == {name: file for file, held in files.items() for name in held}
    else:
        assert list(files) == ["model.safetensors"]


def test_files_are_as_large_as_allowed(tmp_path):
    tensors = drawn([[[10]], [[10]], [[10]], [[50]], [[1]]])
    write_safetensors(tmp_path, pieces(tensors), torch.float32, shard_bytes=80, progress=lambda done, total: None)
    held = [len(safetensors.load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert held == [2, 1, 1, 1]


def test_what_cannot_be_written(tmp_path: Path):
    def write(tensor, dtype=torch.float16, size=(2,)):
        write_safetensors(
            tmp_path, [Piece({"w": size}, lambda: [tensor])], dtype, shard_bytes=100, progress=lambda done, total: None
        )

    with pytest.raises(FileError, match=r"w holds 1e\+05, more than torch\.float16 can \(6\.55e\+04\)"):
        write(torch.tensor([1.0, -1e5]))
    write(torch.tensor([1.0, float("inf")]))  # it was so before
    with pytest.raises(FileError, match=r"w is \(3,\) where \(2,\) was expected"):
        write(torch.ones(3))
    with pytest.raises(FileError, match=r"cannot write .*absent/model\.safetensors: No such file"):
        write_safetensors(
            tmp_path / "absent",
            pieces([[torch.ones(1)]]),
            torch.float32,
            shard_bytes=9,
            progress=lambda done, total: None,
        )


shapes = st.builds(
    lambda groups, per_group, half, ffn, tied, pairs: Shape(
        name="drawn",
        hidden_size=6,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        head_dim=2 * half,
        vocab_size=7,
        tied_embeddings=tied,
        baseline_pairs=pairs,
    ),
    *(st.integers(1, 4) for _ in range(3)),
    st.integers(1, 9),
    st.booleans(),
    st.integers(1, 4),
)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, letters=st.text("AMW", min_size=1, max_size=6))
def test_join_and_split_are_inverse_and_nothing_is_left_out(shape, letters):
    architecture = Architecture(CompositeSequence(letters), shape)
    for parts in (composite_parts(architecture), llama_parts(shape)):
        names = [name for part in parts for name in part.theirs]
        assert len(set(names)) == len(names)
        assert len({part.ours for part in parts}) == len(parts)
        for part in parts:
            tensors = [torch.randn(size) for size in part.sizes]
            again = part.split(part.join(tensors, shape), shape)
            assert all(torch.equal(*pair) for pair in zip(tensors, again, strict=True))
    elements = sum(torch.Size(size).numel() for part in composite_parts(architecture) for size in part.sizes)
    assert elements == architecture.params_total


def test_a_group_has_its_queries_then_its_key_then_its_value():
    """Two groups of two queries, heads two wide: rows of the joined matrix, each numbered by what it was."""
    shape = Shape(
        name="rows",
        hidden_size=1,
        ffn_hidden_size=1,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=2,
        vocab_size=1,
        tied_embeddings=True,
        baseline_pairs=1,
    )
    part = next(part for part in llama_parts(shape) if len(part.theirs) == 3)
    query, key, value = torch.arange(8.0)[:, None], torch.arange(10.0, 14)[:, None], torch.arange(20.0, 24)[:, None]
    joined = part.join([query, key, value], shape)
    assert joined[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
