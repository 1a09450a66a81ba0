"""Training runs on gloo, whole: the same losses whatever the layout.

Every run goes through ``composer_megatron.train``, on one small model, text and seed; `test_equality` compares
gradients, `test_faults` breaks runs and mends them.
"""

import dataclasses
import re

import pytest

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.files import read_json_lines

pytestmark = pytest.mark.skipif(
    cpu.has_gpu(), reason="these runs are compared on the CPU; a GPU machine would use nccl"
)
STEPS = 8


@pytest.fixture
def architecture(place) -> Architecture:
    return Architecture.load(place.path / "architecture.json")


def test_one_process_learns(one_process):
    losses, validations = one_process.scalars("lm loss"), one_process.scalars("lm loss validation")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.1
    assert list(validations) == [4, 8]
    assert validations[8] < validations[4]
    # Evaluated at iteration 8 in the loop and once more at the end: on the same sequences, so with the same result.
    printed = re.findall(r"iteration 8.* \| lm loss value: ([\d.E+-]+)", one_process.output)
    assert [float(loss) for loss in printed] == pytest.approx(2 * [validations[8]], rel=1e-6)


def test_a_run_folder_is_complete(one_process, architecture):
    run = one_process.folder
    assert Architecture.load(run / "architecture.json") == architecture
    assert (run / "tokenizer.json").read_text() == "{}"
    assert (run / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == str(STEPS)
    assert (run / f"checkpoints/iter_{STEPS:07d}/.metadata").is_file()
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    names = {line["name"] for line in read_json_lines(run / "metrics.jsonl")}
    assert {"learning-rate", "grad-norm"} <= names
    assert not any(name.endswith("vs samples") for name in names)
    numbers = re.findall(r"number of parameters on .*: (\d+)", one_process.output)
    assert numbers == [str(architecture.params_total)]


@pytest.mark.parametrize(
    "flags", [("--tensor-model-parallel-size", "2", "--sequence-parallel"), ("--context-parallel-size", "2")]
)
def test_ranks_that_share_sequences_have_the_losses_of_one_process(place, one_process, flags):
    place.run(flags[0].strip("-"), *flags, processes=2).assert_same(one_process)


@pytest.mark.parametrize("processes", [1, 2])
def test_tokens_that_do_not_count_weigh_nothing_on_any_context_parallel_rank(place, processes):
    """Masked ends of documents leave the ranks unequal numbers of tokens; Megatron takes the mean of their means."""
    name = f"masked-{processes}"
    run = place.run(name, "--eod-mask-loss", "--context-parallel-size", str(processes), processes=processes)
    run.assert_same(run if processes == 1 else dataclasses.replace(run, folder=place.path / "masked-1"))


def test_pipeline_runs_through_torchrun_have_the_losses_of_one_process(place, one_process, architecture):
    two = place.torchrun("pp2", "--pipeline-model-parallel-size", "2", processes=2)
    two.assert_same(one_process)
    on_ranks = [int(number) for number in re.findall(r"number of parameters on .*: (\d+)", two.output)]
    assert len(on_ranks) == 2
    assert sum(on_ranks) == architecture.params_total + architecture.embedding_parameters  # tied, on both stages


def test_what_megatron_refuses_is_one_message_of_one_rank(place):
    """Such as the interleaved schedule on two ranks without overlap, which would pair messages wrongly."""
    stages = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
    refused = place.torchrun("refused", *stages, "--no-overlap-p2p-communication", processes=2)
    assert refused.status != 0
    assert len(refused.errors) == 1, refused.output
    assert refused.errors[0].startswith("Megatron refuses these flags: When interleaved schedule is used")
    assert "composer_megatron/train.py" not in refused.output  # torchrun's own report is not ours to leave out


def test_what_the_attention_refuses_is_one_message(place):
    refused = place.run("refused", "--attention-dropout", "0.1")
    assert refused.status == 2
    assert refused.errors[0].startswith("attention_dropout=0.1 is not supported")
    assert "when instantiating" not in refused.errors[0]
    assert "Traceback" not in refused.output
