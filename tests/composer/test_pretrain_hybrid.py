"""Training through Megatron's own scripts: ``--spec`` makes our model, with the losses of `composer_megatron.train`.

The wheel does not bring the scripts. ``pretrain_script.py`` does what they do with the wheel's functions; where the
environment variable MEGATRON_LM names a checkout of Megatron-LM, its scripts run, too, unmodified.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.files import read_json_lines
from composer_megatron.importing.run import import_run
from composer_megatron.script_flags import as_arguments, script_flags
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

pytestmark = pytest.mark.skipif(
    cpu.has_gpu(), reason="these runs are compared on the CPU; a GPU machine would use nccl"
)

HERE = Path(__file__).parent
CHECKOUT = os.environ.get("MEGATRON_LM")
SHAPE = dataclasses.replace(PRESETS["tiny"], hidden_size=32, ffn_hidden_size=64, head_dim=8, num_query_groups=2)
# Asymmetric, so that the cost model's cut is uneven; tied, so that two stages share a matrix.
ARCHITECTURE = Architecture(CompositeSequence.parse("2A5M2A3M"), dataclasses.replace(SHAPE, vocab_size=256))
STEPS, SAVED = 6, 3

RUN_FLAGS = {
    "--mock-data": None,
    "--train-iters": STEPS,
    "--lr": 0.01,
    "--seq-length": 16,
    "--micro-batch-size": 2,
    "--global-batch-size": 8,
    "--log-interval": 1,
    "--eval-iters": 0,
}
"""What the user says of a run: data, length, batches."""

PLAIN_FLAGS = {
    "--transformer-impl": "local",
    "--no-persist-layer-norm": None,
    "--no-gradient-accumulation-fusion": None,
    "--no-rope-fusion": None,
}
"""Without TransformerEngine and Apex; ``docs/pipelines.md`` has the same."""

SCRIPT_FLAGS = {
    "--max-position-embeddings": 16,
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": 256,
    "--min-lr": 0.001,
    "--lr-decay-style": "cosine",
    "--lr-warmup-fraction": 0.05,
    "--weight-decay": 0.1,
    "--adam-beta2": 0.95,
    "--distributed-backend": "gloo",
    "--use-cpu-initialization": None,
    "--num-workers": 0,
    "--override-opt-param-scheduler": None,
    "--eval-interval": 100,
    "--tensorboard-log-interval": 1,
}
"""What `composer_megatron.train` says by itself, and a script has to be told."""

SAME = 1e-6
"""Relative: sums in another order differ by 1e-7."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrain")
    ARCHITECTURE.save(path / "architecture.json")
    return path


def run(command: list[str], place: Path, processes: int) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    finished = subprocess.run(
        [sys.executable, *launcher, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": str(HERE.parents[1]),
            "COMPOSER_ARCHITECTURE": str(place / "architecture.json"),
        },
        timeout=300,
        check=False,
    )
    output = finished.stdout.decode(errors="replace")
    assert finished.returncode == 0, output
    return output


def run_script(kind: str, script: list[str], place: Path, *, pipeline: int, **flags: object) -> dict[int, float]:
    """Train by a script, and return its losses by iteration.

    They are TensorBoard's: Megatron prints the second one averaged with the first.
    """
    events = place / f"events-{len(list(place.iterdir()))}"
    given = {f"--{name.replace('_', '-')}": value for name, value in {**flags, "tensorboard_dir": events}.items()}
    ours = script_flags(ARCHITECTURE, kind, pipeline=pipeline, seq_len=16)
    arguments = as_arguments(ours | RUN_FLAGS | PLAIN_FLAGS | SCRIPT_FLAGS | given)
    run([str(HERE / "pretrain_worker.py"), *script, *arguments], place, pipeline)
    log = EventAccumulator(str(events)).Reload()
    return {event.step: event.value for event in log.Scalars("lm loss")}


def scripts(kind: str) -> list:
    """The script's stand-in, and the script itself where there is a checkout."""
    missing = pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout of Megatron-LM")
    checkout = [str(Path(CHECKOUT or "") / f"pretrain_{kind}.py")]
    return [
        pytest.param([str(HERE / "pretrain_script.py"), kind], id="wheel"),
        pytest.param(checkout, id="checkout", marks=missing),
    ]


@pytest.fixture(scope="module")
def reference(place) -> dict[int, float]:
    """The losses of `composer_megatron.train` in one process, which saves in the middle."""
    flags = {
        "--architecture": place / "architecture.json",
        "--run-dir": place / "reference",
        "--save-interval": SAVED,
    }
    run(["-m", "composer_megatron.train", *as_arguments(flags | RUN_FLAGS)], place, 1)
    lines = read_json_lines(place / "reference/metrics.jsonl")
    losses = {line["iteration"]: line["value"] for line in lines if line["name"] == "lm loss"}
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def after_save(losses: dict[int, float]) -> dict[int, float]:
    return {iteration: loss for iteration, loss in losses.items() if iteration > SAVED}


@pytest.mark.parametrize("script", scripts("hybrid"))
@pytest.mark.parametrize("pipeline", [1, 2])
def test_pretrain_hybrid_goes_on_from_our_checkpoint_with_our_losses(place, reference, script, pipeline):
    losses = run_script(
        "hybrid", script, place, pipeline=pipeline, load=place / "reference/checkpoints", ckpt_step=SAVED
    )
    assert losses == pytest.approx(after_save(reference), rel=SAME)


@pytest.mark.parametrize("script", scripts("gpt"))
def test_pretrain_gpt_starts_fresh_learns_saves_and_goes_on_in_another_layout(place, script):
    checkpoints = place / f"gpt-{Path(script[0]).stem}"
    losses = run_script("gpt", script, place, pipeline=2, save=checkpoints, save_interval=SAVED)
    assert losses.keys() == set(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.05
    again = run_script("gpt", script, place, pipeline=1, load=checkpoints, ckpt_step=SAVED)
    assert again == pytest.approx(after_save(losses), rel=SAME)
    imported = import_run(checkpoints, place / f"imported-{Path(script[0]).stem}").architecture
    assert imported.sequence == ARCHITECTURE.sequence
    assert dataclasses.replace(imported.shape, name="", baseline_pairs=1) == dataclasses.replace(
        ARCHITECTURE.shape, name="", baseline_pairs=1
    )
