"""What a step is expected to take: parts, throughput, and what is said to be assumed."""

import dataclasses

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.layout import Layout
from composer_megatron.pipeline import plan
from composer_megatron.planner.estimate import estimate, notes, summary
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

LLAMA = Architecture(CompositeSequence("AM" * 32), PRESETS["8b"])


def test_one_rank_communicates_nothing() -> None:
    found = plan(LLAMA, Layout(micro_batches=2))
    parts = estimate(found)
    assert (parts.gradients, parts.parameters, parts.tied_embedding) == (0.0, 0.0, 0.0)
    assert found.bubble(found.seconds) == pytest.approx(0.0, abs=1e-12)
    assert parts.optimizer == pytest.approx(38 * LLAMA.params_total / 3.0e12)
    assert parts.seconds == parts.schedule + parts.optimizer


def test_replicas_reduce_gradients_beside_the_last_backward_pass() -> None:
    layout = Layout(data_parallel=16, seq_len=64, micro_batches=1)
    found = plan(LLAMA, layout)
    reduced = 2 * 4 * LLAMA.params_total * 15 / 16 / (0.8 * 50e9)  # ring all-reduce between nodes
    beside = found.stages[0].backward_seconds
    assert estimate(found).gradients == pytest.approx(reduced - beside)
    shared = estimate(plan(LLAMA, dataclasses.replace(layout, distributed_optimizer=True)))
    assert shared.gradients == pytest.approx(reduced / 2 - beside)
    assert shared.parameters == pytest.approx(reduced / 4 - found.stages[0].forward_seconds)
    assert shared.optimizer == pytest.approx(estimate(found).optimizer / 16)
    assert estimate(plan(LLAMA, dataclasses.replace(layout, seq_len=65536))).gradients == 0.0


def test_tied_embeddings_are_summed_between_first_and_last_stage() -> None:
    tied = Architecture(CompositeSequence("AM" * 16), PRESETS["1b"])
    assert estimate(plan(tied, Layout())).tied_embedding == 0.0
    found = estimate(plan(tied, Layout(pipeline_parallel=2))).tied_embedding
    assert found == pytest.approx(4 * 128_256 * 2048 / (0.8 * 450e9))
    assert estimate(plan(LLAMA, Layout(pipeline_parallel=2))).tied_embedding == 0.0


def test_summary_agrees_with_itself() -> None:
    layout = Layout(tensor_parallel=2, pipeline_parallel=4, data_parallel=4, micro_batches=16, sequence_parallel=True)
    values = summary(plan(LLAMA, layout))
    tokens = 16 * 4 * 4096
    assert values["tokens_per_second"] == pytest.approx(tokens / values["step_time"])
    assert values["tokens_per_second_per_gpu"] == pytest.approx(values["tokens_per_second"] / 32)
    flops = LLAMA.flops_per_token(4096) * values["tokens_per_second_per_gpu"]
    assert values["mfu"] == pytest.approx(flops / 989e12)
    assert sum(values["step_time_parts"].values()) == pytest.approx(values["step_time"])
    busy = sum(stage["forward_seconds"] + stage["backward_seconds"] for stage in values["stages"]) * 16 / 4
    assert values["bubble"] == pytest.approx(1 - busy / values["step_time_parts"]["schedule"])
    assert values["bubble"] < values["bubble_equal_split"]
    assert values["schedule_time_at_least"] == pytest.approx(values["step_time_parts"]["schedule"])
    assert len(values["memory_bytes"]) == len(values["params_per_rank"]) == 4


def test_assumptions_name_what_matters() -> None:
    said = " ".join(summary(plan(LLAMA, Layout()))["assumes"])
    assert "predicted, not measured" in said
    assert "nodes of 8" not in said
    wide = Layout(tensor_parallel=2, context_parallel=2, data_parallel=2, pipeline_parallel=2, recompute="selective")
    said = " ".join(summary(plan(LLAMA, wide))["assumes"])
    for word in ("nodes of 8", "tensor-parallel", "keys and values go round", "gradients are reduced", "selective"):
        assert word in said


def test_a_heavy_loss_head_speaks_against_interleaving() -> None:
    small = Architecture(CompositeSequence.parse("(AM)x32"), PRESETS["1b"])
    assert "--vpp 1" in notes(plan(small, Layout(pipeline_parallel=8, virtual_stages=4)))[0]
    big = Architecture(CompositeSequence.parse("(AM)x80"), PRESETS["70b"])
    assert notes(plan(big, Layout(pipeline_parallel=4, virtual_stages=2, tensor_parallel=8))) == []
