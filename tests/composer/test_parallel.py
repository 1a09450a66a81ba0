"""Training runs on gloo, whole: the same losses whatever the layout, and after a kill, and from another layout's save.

Every run goes through ``composer_megatron.train``, as a user starts it, on one small model, text and seed.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.files import read_json_lines
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

pytestmark = pytest.mark.skipif(
    cpu.has_gpu(), reason="these runs are compared on the CPU; a GPU machine would use nccl"
)

SHAPE = dataclasses.replace(PRESETS["tiny"], hidden_size=32, ffn_hidden_size=64, head_dim=8, num_query_groups=2)
# Asymmetric, so that the cost model's cut is uneven; tied, so that two stages share a matrix.
ARCHITECTURE = Architecture(CompositeSequence.parse("2A5M2A3M"), dataclasses.replace(SHAPE, vocab_size=256))
STEPS = 8

SAME = 1e-5
"""Relative: what the issue asks for. Sums in another order differ by 1e-7."""

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished run printed and logged."""

    status: int
    output: str
    folder: Path

    def scalars(self, name: str) -> dict[int, float]:
        """A logged scalar by iteration; each iteration is logged once."""
        lines = [line for line in read_json_lines(self.folder / "metrics.jsonl") if line["name"] == name]
        assert [line["iteration"] for line in lines] == sorted({line["iteration"] for line in lines})
        return {line["iteration"]: line["value"] for line in lines}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the runs of this file are: architecture and text, and how to start one."""

    path: Path

    def command(self, name: str, *flags: str, processes: int = 1) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        common = {
            "--architecture": self.path / "architecture.json",
            "--text": self.path / "text",
            "--run-dir": self.path / name,
            "--train-iters": STEPS,
            "--lr": 0.01,
            "--seq-length": 16,
            "--micro-batch-size": 2,
            "--global-batch-size": 8,
            "--log-interval": 1,
            "--eval-iters": 2,
            "--eval-interval": 4,
        }
        ours = [part for flag, value in common.items() for part in (flag, str(value))]
        return [sys.executable, *(launcher if processes > 1 else []), "-m", "composer_megatron.train", *ours, *flags]

    def run(self, name: str, *flags: str, processes: int = 1) -> Run:
        finished = subprocess.run(
            self.command(name, *flags, processes=processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            timeout=200,
            check=False,
        )
        return Run(finished.returncode, finished.stdout.decode(errors="replace"), self.path / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    path = tmp_path_factory.mktemp("runs")
    ARCHITECTURE.save(path / "architecture.json")
    text = path / "text"
    text.mkdir()
    (text / "tokenizer.json").write_text("{}")
    vocab_size = ARCHITECTURE.shape.vocab_size
    generator = np.random.default_rng(0)
    about = {"format": "composer-text", "version": 1, "sources": [], "vocab_size": vocab_size, "end_of_text": 0}
    for part, documents in {"train": 60, "valid": 20}.items():
        builder = IndexedDatasetBuilder(str(text / f"{part}.bin"), dtype=DType.optimal_dtype(vocab_size))
        lengths = generator.integers(10, 60, documents)
        for length in lengths:
            ids = generator.integers(1, 3, length).cumsum() % (vocab_size - 1) + 1
            builder.add_item(torch.from_numpy(np.append(ids, 0)))
            builder.end_document()
        builder.finalize(str(text / f"{part}.idx"))
        about[part] = {"documents": documents, "tokens": int(lengths.sum()) + documents, "bytes": int(lengths.sum())}
    about["valid"] |= {"unigram_nats_per_token": 5.5, "unigram_bits_per_byte": 8.0}
    (text / "text.json").write_text(json.dumps(about))
    return Place(path)


@pytest.fixture(scope="module")
def one_process(place) -> Run:
    run = place.run("one")
    assert run.status == 0, run.output
    return run


def assert_same(run: Run, wanted: Run, last: int = STEPS) -> None:
    """The same loss and gradient norm at each iteration, and the same held-out loss at each evaluation."""
    assert run.status == 0, run.output
    for name in ("lm loss", "grad-norm", "lm loss validation"):
        values = {iteration: value for iteration, value in wanted.scalars(name).items() if iteration <= last}
        found = {iteration: value for iteration, value in run.scalars(name).items() if iteration <= last}
        assert found == pytest.approx(values, rel=SAME, abs=0), name


def test_one_process_learns(one_process):
    losses, validations = one_process.scalars("lm loss"), one_process.scalars("lm loss validation")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.1
    assert list(validations) == [4, 8]
    assert validations[8] < validations[4]
    # Evaluated at iteration 8 in the loop and once more at the end: on the same sequences, so with the same result.
    printed = re.findall(r"iteration 8.* \| lm loss value: ([\d.E+-]+)", one_process.output)
    assert [float(loss) for loss in printed] == pytest.approx(2 * [validations[8]], rel=1e-6)


def test_a_run_folder_is_complete(one_process):
    run = one_process.folder
    assert Architecture.load(run / "architecture.json") == ARCHITECTURE
    assert (run / "tokenizer.json").read_text() == "{}"
    assert (run / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == str(STEPS)
    assert (run / f"checkpoints/iter_{STEPS:07d}/.metadata").is_file()
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    names = {line["name"] for line in read_json_lines(run / "metrics.jsonl")}
    assert {"learning-rate", "grad-norm"} <= names
    assert not any(name.endswith("vs samples") for name in names)
    numbers = re.findall(r"number of parameters on .*: (\d+)", one_process.output)
    assert numbers == [str(ARCHITECTURE.params_total)]


@pytest.mark.parametrize("name", ["tp2", "tp2sp"])
def test_tensor_parallel_runs_have_the_losses_of_one_process(place, one_process, name):
    flags = ("--sequence-parallel",) if name == "tp2sp" else ()
    run = place.run(name, "--tensor-model-parallel-size", "2", *flags, processes=2)
    assert_same(run, one_process)


def test_pipeline_runs_have_the_losses_of_one_process_which_can_go_on_from_their_checkpoint(place, one_process):
    two = place.run("pp2", "--pipeline-model-parallel-size", "2", "--exit-interval", "5", processes=2)
    assert_same(two, one_process, last=5)
    assert max(two.scalars("lm loss")) == 5
    on_ranks = [int(number) for number in re.findall(r"number of parameters on .*: (\d+)", two.output)]
    assert len(on_ranks) == 2
    assert sum(on_ranks) == ARCHITECTURE.params_total + ARCHITECTURE.embedding_parameters  # tied, on both stages
    assert_same(place.run("pp2"), one_process)


def test_an_interleaved_pipeline_with_an_empty_stage_has_the_losses_of_one_process(place, one_process):
    """Both can go wrong in silence: see `CompositeStack`, and Megatron's --no-overlap-p2p-communication."""
    cut = ("--hybrid-layer-pattern", "**---||--**|---", "--pipeline-model-parallel-size", "2")
    assert_same(place.run("pp2vpp2", *cut, processes=2), one_process)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(place, one_process):
    metrics = place.path / "killed/metrics.jsonl"
    flags = ("killed", "--save-interval", "2")
    process = subprocess.Popen(
        place.command(*flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"iteration": 5' in metrics.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no iteration 5 in two minutes"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with metrics.open("a") as file:
        file.write('{"iteration": 6, "name": "lm l')  # what a kill can leave
    saved = int((place.path / "killed/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert 4 <= saved < STEPS
    run = place.run(*flags)
    assert_same(run, one_process)
    assert re.findall(r"iteration +(\d+)/", run.output)[0] == str(saved + 1)


def test_what_megatron_refuses_is_one_message_of_one_rank(place):
    """Such as the interleaved schedule on two ranks without overlap, which would pair messages wrongly."""
    stages = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
    refused = place.run("refused", *stages, "--no-overlap-p2p-communication", processes=2)
    assert refused.status != 0
    errors = [line for line in refused.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, refused.output
    assert errors[0].startswith("error: Megatron refuses these flags: When interleaved schedule is used")
    assert "composer_megatron/train.py" not in refused.output  # torchrun's own report is not ours to leave out


def test_what_the_attention_refuses_is_one_message(place):
    refused = place.run("refused", "--attention-dropout", "0.1")
    assert refused.status == 2
    assert re.findall("error: .*", refused.output)[0].startswith("error: attention_dropout=0.1 is not supported")
    assert "Traceback" not in refused.output
