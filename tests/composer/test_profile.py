"""Profiles: measured, written, read back, and refused where they are of something else."""

import dataclasses
import json
from pathlib import Path

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError, UsageError
from composer_megatron.layout import Layout
from composer_megatron.pipeline import plan
from composer_megatron.planner.profile import Profile, measure
from composer_megatron.roofline import Passes
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

TINY = Architecture(CompositeSequence.parse("2A4M"), PRESETS["tiny"])
PROFILE = Profile(
    device="cpu",
    dtype="float32",
    shape=PRESETS["tiny"],
    seq_len=32,
    micro_batch_size=2,
    blocks={"A": Passes(1.0, 2.0), "M": Passes(3.0, 5.0)},
    embedding=Passes(0.25, 0.5),
    head=Passes(4.0, 7.0),
    environment={"python": "3.12"},
)
LAYOUT = Layout(seq_len=32, micro_batch_size=2)


def test_round_trip(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == PROFILE


def test_a_plan_from_measured_times() -> None:
    """Two ranks: with one micro-batch a step is the sum of all passes, whatever the cut; nothing else costs time."""
    layout = dataclasses.replace(LAYOUT, pipeline_parallel=2, micro_batches=1)
    found = plan(TINY, layout, device=None, times=PROFILE.times(TINY, layout))
    assert found.seconds == pytest.approx(2 * (1 + 2) + 4 * (3 + 5) + 0.75 + 11)
    assert not found.times.predicted
    many = dataclasses.replace(LAYOUT, pipeline_parallel=2, micro_batches=200)
    found = plan(TINY, many, device=None, times=PROFILE.times(TINY, many))
    assert found.cut.counts == [4, 2]  # 22.75 against 27; five blocks would make 30.75


def test_recomputation() -> None:
    times = PROFILE.times(TINY, dataclasses.replace(LAYOUT, recompute="full"))
    assert times.blocks == {"A": Passes(1.0, 3.0), "M": Passes(3.0, 8.0)}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"seq_len": 64}, "seq_len=32, the plan has seq_len=64"),
        ({"micro_batch_size": 1}, "micro_batch_size=2, the plan has micro_batch_size=1"),
        ({"tensor_parallel": 2}, "tensor_parallel=1, the plan has tensor_parallel=2"),
        ({"context_parallel": 2}, "context_parallel=1, the plan has context_parallel=2"),
        ({"recompute": "selective"}, "core attention"),
    ],
)
def test_another_layout(layout, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PROFILE.times(TINY, dataclasses.replace(LAYOUT, **layout))


def test_another_shape() -> None:
    with pytest.raises(
        UsageError, match=r"profile is of shape 'tiny' with hidden_size=64, .* 'demo' with hidden_size=160"
    ):
        PROFILE.times(Architecture(TINY.sequence, PRESETS["demo"]), LAYOUT)
    renamed = dataclasses.replace(PRESETS["tiny"], name="mine", rope_scaling_factor=32.0)  # neither takes time
    assert PROFILE.times(Architecture(TINY.sequence, renamed), LAYOUT)
    assert dataclasses.replace(PROFILE, shape=renamed).times(TINY, LAYOUT)
    old = dataclasses.replace(PROFILE, blocks={"A": Passes(1.0, 2.0)})
    with pytest.raises(UsageError, match="no times of M"):
        old.times(TINY, LAYOUT)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values.update(format="x"), "is no profile"),
        (lambda values: values.pop("seconds"), "'seconds' is missing"),
        (lambda values: values["seconds"]["blocks"]["A"].pop("forward"), "'forward' is missing"),
        (lambda values: values["seconds"]["head"].update(backward=-1), "seconds of 4.0 and -1.0"),
        (lambda values: values["seconds"].update(blocks=[]), "no whole profile"),
        (lambda values: values["shape"].pop("vocab_size"), "vocab_size"),
    ],
)
def test_spoilt_files(tmp_path: Path, spoil, message: str) -> None:
    values = PROFILE.as_dict()
    values = json.loads(json.dumps(values))
    spoil(values)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    with pytest.raises(FileError, match=message):
        Profile.load(path)


def test_measured_here() -> None:
    """Every part takes time; a wider MLP takes longer. The figures themselves are the machine's."""
    pytest.importorskip("megatron.core", reason="needs the extra [train]")
    wide = dataclasses.replace(PRESETS["tiny"], ffn_hidden_size=8192, vocab_size=16384)
    found = measure(wide, seq_len=128, repeats=3)
    assert set(found.blocks) == {"A", "M"}
    assert all(seconds > 0 for passes in found.blocks.values() for seconds in passes)
    assert found.blocks["M"].forward > found.blocks["A"].forward  # 1.6 M weights against 10 thousand
    assert sum(found.head) > sum(found.blocks["A"])
    assert found.shape == wide
    assert found.environment["packages"]["torch"]


@pytest.mark.parametrize("sizes", [{"seq_len": 0}, {"seq_len": 8, "repeats": 0}, {"seq_len": 8, "micro_batch_size": 0}])
def test_nothing_to_time(sizes) -> None:
    with pytest.raises(UsageError, match="expected at least 1"):
        measure(PRESETS["tiny"], **sizes)
