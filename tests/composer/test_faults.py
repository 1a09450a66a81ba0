"""Runs that break, and go on as if nothing had happened: kills, damaged checkpoints, other layouts, failing ranks."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from composer_megatron import cpu, resume
from composer_megatron.checkpoint import complete_iterations
from composer_megatron.errors import FileError

pytestmark = pytest.mark.skipif(
    cpu.has_gpu(), reason="these runs are compared on the CPU; a GPU machine would use nccl"
)
STEPS = 8
TWO_STAGES = ("--pipeline-model-parallel-size", "2")
SAVING = ("--save-interval", "2")
KILLED = -signal.SIGKILL


def first_iteration(output: str) -> int:
    return int(re.findall(r"iteration +(\d+)/", output)[0])


def tracker(run: Path) -> Path:
    return run / "checkpoints/latest_checkpointed_iteration.txt"


def test_a_rank_killed_in_the_middle_of_a_checkpoint_loses_the_steps_since_the_one_before(place, one_process):
    killed = place.run("killed", *TWO_STAGES, *SAVING, processes=2, fault="die-while-saving:4")
    assert killed.status == KILLED
    half = killed.folder / "checkpoints/iter_0000004"
    assert half.is_dir()
    assert complete_iterations(half.parent) == [2]
    with (killed.folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "name": "lm l')  # what a kill can leave, too
    again = place.run("killed", *TWO_STAGES, *SAVING, processes=2)
    again.assert_same(one_process)
    assert first_iteration(again.output) == 3
    assert complete_iterations(half.parent) == [2, 4, 6, 8]


def test_a_run_killed_at_any_time_goes_on(place, one_process):
    """Killed as a user would, from outside and wherever it may be."""
    metrics = place.path / "any/metrics.jsonl"
    command = [sys.executable, "-m", "composer_megatron.train", *place.arguments("any", *SAVING)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"iteration": 5' in metrics.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no iteration 5 in two minutes"
        time.sleep(0.005)
    process.kill()
    process.wait()
    place.run("any", *SAVING).assert_same(one_process)


@pytest.fixture(scope="module")
def six_steps(place) -> Path:
    """A run with checkpoints at 2, 4 and 6, saved in the background. Tests damage copies of it."""
    run = place.run("six", *TWO_STAGES, *SAVING, "--exit-interval", "6", "--async-save", processes=2)
    assert run.status == 0, run.output
    assert "Disabling --async-save" not in run.output
    assert complete_iterations(run.folder / "checkpoints") == [2, 4, 6]
    assert tracker(run.folder).read_text().strip() == "6"
    return run.folder


def flip_a_bit(checkpoint: Path) -> None:
    file = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(checkpoint: Path) -> None:
    for file in checkpoint.glob("*.distcp"):
        os.truncate(file, file.stat().st_size - 100)


def lose_a_file(checkpoint: Path) -> None:
    next(checkpoint.glob("__1_*.distcp")).unlink()


def tear_the_index(checkpoint: Path) -> None:
    os.truncate(checkpoint / ".metadata", 300)


def fill_with_zeros(checkpoint: Path) -> None:
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))


DAMAGE = {
    flip_a_bit: "distcp does not have its checksums",
    cut_off: "is cut off at",
    lose_a_file: "is missing",
    tear_the_index: ".metadata cannot be read",
    fill_with_zeros: "does not have its checksums",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(six_steps, tmp_path, damage):
    checkpoint = Path(shutil.copytree(six_steps / "checkpoints/iter_0000004", tmp_path / "iter_0000004"))
    assert resume.find_damage(checkpoint) == ""
    damage(checkpoint)
    assert DAMAGE[damage] in resume.find_damage(checkpoint)
    shares = [resume.find_damage(checkpoint, share, 3) for share in range(3)]
    assert any(shares)  # whoever reads the file finds it


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(six_steps, place, one_process):
    run = Path(shutil.copytree(six_steps, place.path / "damaged"))
    flip_a_bit(run / "checkpoints/iter_0000006")
    again = place.run("damaged", *TWO_STAGES, processes=2)
    again.assert_same(one_process)
    assert first_iteration(again.output) == 5
    said = re.findall(r"warning: .*", again.output)
    assert len(said) == 1
    assert re.search(r"iter_0000006 is damaged: __\d_0.distcp does not .*; going on from iteration 4$", said[0])


def test_a_torn_tracker_file_is_put_right(six_steps, place, one_process):
    """Megatron writes it in place, so a kill can leave it empty."""
    run = Path(shutil.copytree(six_steps, place.path / "torn"))
    tracker(run).write_text("")
    again = place.run("torn")
    again.assert_same(one_process)
    assert first_iteration(again.output) == 7


def test_where_no_checkpoint_is_whole_nothing_starts_from_scratch(six_steps, place):
    run = Path(shutil.copytree(six_steps, place.path / "lost"))
    for checkpoint in (run / "checkpoints").glob("iter_*"):
        cut_off(checkpoint)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*.distcp")}
    lost = place.run("lost", *TWO_STAGES, processes=2)
    assert lost.status == 1
    assert "has no whole checkpoint: iter_0000006 is damaged" in lost.errors[0]
    assert "Traceback" not in lost.output
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.distcp")} == before


def test_a_run_goes_on_in_other_layouts(place, one_process):
    """Each leg loads what another layout saved, two ranks' optimizer state sharded over data ranks or not at all."""
    empty_stages = ("--hybrid-layer-pattern", "**---||--**|---", *TWO_STAGES)
    legs = {
        2: (),
        4: empty_stages,
        5: empty_stages,
        6: ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        7: ("--context-parallel-size", "2"),
    }
    for last, layout in legs.items():
        leg = place.run("legs", "--use-distributed-optimizer", *layout, "--exit-interval", str(last), processes=2)
        assert leg.status == 0, leg.output
        assert max(leg.scalars("lm loss")) == last
    place.run("legs", "--use-distributed-optimizer").assert_same(one_process)


def test_a_rank_that_raises_ends_all_ranks_with_its_message(place):
    """In the middle of a step, where the other rank waits for its tensors."""
    start = time.monotonic()
    failed = place.torchrun("failed", *TWO_STAGES, processes=2, fault="fail-at-micro-batch:6")
    assert failed.status == 1
    assert "RuntimeError: out of paper" in failed.output
    assert time.monotonic() - start < 60  # not the ten minutes that a collective may wait


class Alone:
    """A process group of one, without Megatron."""

    def __enter__(self) -> None:
        import torch.distributed as dist

        self.started = not dist.is_initialized()
        if self.started:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        if self.started:
            dist.destroy_process_group()


def test_which_checkpoint_is_chosen(six_steps, tmp_path, capsys):
    def choose(*, ours: bool = True) -> int | None:
        with Alone():
            return resume.choose(folder, ours=ours)

    folder = tmp_path / "none"
    assert choose() is None
    folder.mkdir()
    assert choose() is None
    folder = Path(shutil.copytree(six_steps / "checkpoints", tmp_path / "checkpoints"))
    assert choose() is None  # the tracker's will do
    track = folder / "latest_checkpointed_iteration.txt"
    track.write_text("release")
    assert choose() is None
    track.write_text("4")
    assert choose() is None  # the user went back
    track.write_text("9")
    assert choose(ours=False) == 6
    assert "iter_0000009 is missing; going on from iteration 6" in capsys.readouterr().out
    assert track.read_text() == "9"  # another run's file
    track.write_text("\x00")
    with pytest.raises(FileError, match="names no checkpoint; put the number of a checkpoint there, such as 6"):
        choose(ours=False)
    assert choose() == 6
    assert track.read_text() == "6"
    (folder / "iter_0000006/.metadata").unlink()
    assert choose() == 4
    assert "iter_0000006 is incomplete; going on from iteration 4" in capsys.readouterr().out
