"""The three places where CompositeStack differs from Megatron's HybridStack."""

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.spec_utils import build_module

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.backend import BACKENDS
from composer_megatron.model import initialize_single_process, transformer_config
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.specs import composite_stack_spec
from composer_megatron.stack import CompositeStack

torch.set_num_threads(1)
ARCHITECTURE = Architecture(CompositeSequence.parse("AM"), PRESETS["tiny"])


def stack(layers, **kwargs) -> CompositeStack:
    initialize_single_process()
    config = transformer_config(ARCHITECTURE, dtype=torch.float32, backend=BACKENDS["local"], on_cpu=True)
    config.perform_initialization = True
    built = build_module(
        composite_stack_spec,
        config,
        layer_type_list=list(layers),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **kwargs,
    )
    assert isinstance(built, CompositeStack)
    return built


def hidden_states(**kwargs) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(8, 2, ARCHITECTURE.shape.hidden_size, **kwargs)


def test_an_empty_stage_survives_the_freeing_of_its_output():
    """Megatron frees a stage's output once it is sent; the previous stage's backward still needs the input."""
    x = hidden_states(requires_grad=True)
    received = x * x
    output = stack("", pre_process=True, post_process=False)(received, None)
    torch.testing.assert_close(output, received, rtol=0, atol=0)
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    assert received.numel() == x.numel()
    received.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_the_last_stage_ends_with_the_norm_of_the_spec():
    built = stack("-", post_process=True)
    assert isinstance(built.final_norm, BACKENDS["local"].final_norm)
    output = built(hidden_states(), None)
    torch.testing.assert_close(output.pow(2).mean(-1), torch.ones(8, 2), rtol=1e-3, atol=1e-3)  # eps in the norm


@pytest.mark.parametrize("wish", [{"post_process": False}, {"post_layer_norm": False}])
def test_other_stages_have_no_final_norm(wish):
    assert not hasattr(stack("-", **wish), "final_norm")


def test_dropout_under_sequence_parallelism_draws_from_the_ranks_own_generator(monkeypatch):
    """Ranks hold different tokens, so they must not share a mask; without it they all see every token, and must."""
    if not cpu.has_gpu():
        for replacement in (*cpu._torch_replacements(), *cpu._megatron_replacements()):
            if replacement.name.endswith(("rng_state", "manual_seed")):
                monkeypatch.setattr(replacement.owner, replacement.name, replacement.value)
    tracker = CudaRNGStatesTracker()
    monkeypatch.setattr("composer_megatron.stack.get_cuda_rng_tracker", lambda: tracker)
    built = stack("-", post_process=False)
    built.layers[0].hidden_dropout = 0.5

    def run(rank_seed: int) -> torch.Tensor:
        tracker.reset()
        tracker.add("model-parallel-rng", rank_seed)
        torch.manual_seed(1)  # what the ranks share
        return built(hidden_states(), None)

    assert torch.equal(run(1), run(2))
    built.config.sequence_parallel = True
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1), run(1))
