"""What is silently wrong in Megatron-core is refused, for users of the library too."""

import dataclasses

import pytest
import torch

from composer_megatron.architecture import Architecture
from composer_megatron.backend import get_backend
from composer_megatron.errors import UsageError
from composer_megatron.guards import check_layout, check_schedule
from composer_megatron.model import initialize_single_process, transformer_config
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.specs import stack_spec

ARCHITECTURE = Architecture(
    CompositeSequence.parse("2A5M2A3M"), dataclasses.replace(PRESETS["tiny"], num_query_groups=2)
)


def config(**changes):
    initialize_single_process()
    made = transformer_config(ARCHITECTURE, dtype=torch.float32, backend=get_backend("local"), on_cpu=True)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


WRONG = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "batch_p2p_comm": True}


def test_two_interleaved_ranks_with_batched_transfers_are_refused():
    with pytest.raises(UsageError, match="set overlap_p2p_comm=True and batch_p2p_comm=False"):
        check_schedule(config(**WRONG))
    for right in ({"batch_p2p_comm": False}, {"pipeline_model_parallel_size": 4}):
        check_schedule(config(**(WRONG | right)))
    check_schedule(config(**(WRONG | {"virtual_pipeline_model_parallel_size": None})))


def test_the_stack_refuses_it_wherever_it_is_built():
    spec = stack_spec(get_backend("local"))
    with pytest.raises(UsageError, match="exchange wrong tensors in silence"):
        spec.module(config(**WRONG), spec.submodules, **spec.params)


@pytest.mark.parametrize(
    ("given", "world_size", "message"),
    [
        ({"tensor_model_parallel_size": 3}, 3, "tensor_parallel=3 does not divide num_attention_heads"),
        ({"pipeline_model_parallel_size": 2}, 3, "1 x pipeline 2 x context 1 = 2 ranks do not divide 3 processes"),
        ({"tensor_model_parallel_size": 2}, 1, "2 ranks do not divide 1 process; start a multiple of 2"),
        ({"pipeline_model_parallel_size": 13}, 13, "13 pipeline stages for the 12 blocks"),
        ({"context_parallel_size": 0}, 1, "--context-parallel-size 0; expected at least 1"),
        ({"context_parallel_size": 3}, 3, "seq_len=64 is no multiple of 6"),
    ],
)
def test_layouts_that_do_not_divide(given, world_size, message):
    with pytest.raises(UsageError, match=message):
        check_layout(ARCHITECTURE, given, virtual_stages=1, seq_len=64, world_size=world_size)


def test_the_rest_of_the_ranks_are_data_parallel():
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    layout = check_layout(ARCHITECTURE, sizes, virtual_stages=1, seq_len=64, world_size=8)
    assert (layout.data_parallel, layout.ranks) == (2, 8)
