"""CompositeStack: fusing residual additions with norms changes no bit; and the places where Megatron's is mended."""

import contextlib
import dataclasses
import functools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.spec_utils import build_module

from composer_megatron import cpu, stack
from composer_megatron.architecture import Architecture
from composer_megatron.backend import get_backend
from composer_megatron.layers.block import CompositeLayer
from composer_megatron.model import initialize_single_process, transformer_config
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.specs import stack_spec
from composer_megatron.stack import CompositeStack

torch.set_num_threads(1)
ARCHITECTURE = Architecture(CompositeSequence.parse("AM"), PRESETS["tiny"])
LOCAL = get_backend("local")


@pytest.fixture
def generators(monkeypatch) -> CudaRNGStatesTracker:
    """Megatron's generators on the CPU's, as in training; recomputation and sequence parallelism fork them."""
    if not cpu.has_gpu():
        for replacement in (*cpu._torch_replacements(), *cpu._megatron_replacements()):
            if replacement.name.endswith(("rng_state", "manual_seed")):
                monkeypatch.setattr(replacement.owner, replacement.name, replacement.value)
    tracker = CudaRNGStatesTracker()
    monkeypatch.setattr(stack, "get_cuda_rng_tracker", lambda: tracker)
    monkeypatch.setattr(parallel_random, "_CUDA_RNG_STATE_TRACKER", tracker)
    monkeypatch.setattr(parallel_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
    return tracker


def stack_of(layers, *, backend=LOCAL, dtype=torch.float32, changes=None, **kwargs) -> CompositeStack:
    initialize_single_process()
    config = transformer_config(
        ARCHITECTURE,
        dtype=dtype,
        backend=backend,
        on_cpu=True,
        perform_initialization=True,
        init_method_std=0.3,
        num_query_groups=2,
        **(changes or {}),
    )
    torch.manual_seed(2)
    built = build_module(
        stack_spec(backend),
        config,
        layer_type_list=list(layers),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **kwargs,
    )
    assert isinstance(built, CompositeStack)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "norm" in name:
                weight.mul_(1 + 0.3 * torch.rand_like(weight))  # weights that a norm too few would show
    return built


def hidden_states(dtype=torch.float32, **kwargs) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(8, 2, ARCHITECTURE.shape.hidden_size, dtype=dtype, **kwargs)


def run(built: CompositeStack, *, unfused: bool = False) -> dict[str, torch.Tensor]:
    """Output and all gradients."""
    if unfused:
        built.unfused_because = "this test"
    x = hidden_states(built.layers[0].config.params_dtype, requires_grad=True)
    torch.manual_seed(5)  # dropout
    output = built(x, None)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
    return {"output": output.detach(), "x": x.grad} | {name: weight.grad for name, weight in built.named_parameters()}


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@settings(max_examples=12, deadline=None)
@given(st.text("*-", min_size=1, max_size=7), st.booleans(), st.sampled_from(["local", "composer"]))
def test_fused_and_unfused_are_equal_bit_for_bit(layers, last_stage, backend):
    build = functools.partial(stack_of, layers, backend=get_backend(backend), post_process=last_stage)
    fused = build()
    assert fused.unfused_because is None
    assert_same_bits(run(fused), run(build(), unfused=True))


WISHES = {
    "dropout": {"hidden_dropout": 0.4},
    "biases": {"add_bias_linear": True, "bias_dropout_fusion": False},
    "core attention recomputed": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "MLPs recomputed": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    **{
        f"{method} {count} recomputed": {
            "recompute_granularity": "full",
            "recompute_method": method,
            "recompute_num_layers": count,
            "hidden_dropout": 0.4,  # drawn again, the same
        }
        for method in ("uniform", "block")
        for count in (1, 2, 5)
    },
}


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize("backend", ["local", "composer"])
def test_whatever_the_configuration_asks_for(name, backend, generators):
    build = functools.partial(stack_of, "*-*--", backend=get_backend(backend), changes=WISHES[name])
    assert_same_bits(run(build()), run(build(), unfused=True))


@pytest.mark.parametrize("backend", ["local", "composer"])
def test_norms_are_recomputed_without_transformer_engine(backend, generators, monkeypatch):
    """Where Megatron's own stack fails; against no recomputation."""

    def copy_storage(freed: torch.Tensor, again: torch.Tensor) -> None:
        storage = again.untyped_storage()
        freed.untyped_storage().resize_(storage.nbytes())
        freed.untyped_storage().copy_(storage)

    # Megatron compiles this function in C++ when first needed, for a quarter of a minute.
    monkeypatch.setattr(parallel_random, "_get_share_storage", lambda: copy_storage)
    build = functools.partial(stack_of, "*-*--", backend=get_backend(backend))
    changes = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    found, wanted = run(build(changes=changes)), run(build())
    for name, value in wanted.items():  # PyTorch's norm is many operations: their gradients are added in another order
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("backend", ["local", "composer"])
def test_a_residual_stream_in_fp32_under_blocks_in_bf16(backend):
    build = functools.partial(
        stack_of,
        "*-*--",
        backend=get_backend(backend),
        dtype=torch.bfloat16,
        changes={"fp32_residual_connection": True},
    )
    fused = build(post_process=False)
    assert fused(hidden_states(torch.bfloat16), None).dtype == torch.float32
    assert build()(hidden_states(torch.bfloat16), None).dtype == torch.bfloat16  # what the output layer takes
    found, wanted = run(build()), run(build(), unfused=True)
    for name, value in wanted.items():  # in bf16 one rounding, where the order of additions differs
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-2 * value.abs().max().item(), msg=name)
    exact = run(stack_of("*-*--"))["output"]
    apart = {
        kind: (run(stack_of("*-*--", dtype=torch.bfloat16, changes=changes))["output"] - exact).norm()
        for kind, changes in {"bf16": {}, "fp32": {"fp32_residual_connection": True}}.items()
    }
    assert apart["fp32"] < apart["bf16"]


def test_every_addition_is_fused_but_none_before_the_first_block(monkeypatch):
    """Counted in the norms: one for each block, the final norm's among them."""
    built = stack_of("*--*")
    calls = []
    for norm in (module for name, module in built.named_modules() if name.endswith("norm")):
        norm.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs)))
    assert built(hidden_states(), None).isfinite().all()
    assert calls == [1, 2, 2, 2, 2]


def test_hooks_on_layers_run():
    """Sharded data parallelism gathers a layer's parameters so."""
    built = stack_of("*-")
    calls = []
    for layer in built.layers:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer.layer_number))
    built(hidden_states(), None)
    assert calls == [1, 2]


@pytest.mark.parametrize("cut", range(5))
def test_stages_one_after_the_other_are_the_whole(cut):
    """What one stage sends is the sum, and the next one starts from it."""
    whole = stack_of("*-*-")
    first = stack_of("*-*-"[:cut], post_process=False)
    second = stack_of("*-*-"[cut:], pre_process=False, pp_layer_offset=cut)
    for name, weight in whole.named_parameters():
        index = int(name.split(".")[1]) if name.startswith("layers") else None
        stage, shift = (first, 0) if index is not None and index < cut else (second, cut)
        own = name if index is None else name.replace(f"layers.{index}", f"layers.{index - shift}", 1)
        stage.get_parameter(own).data.copy_(weight.data)
    second.set_input_tensor(first(hidden_states(), None))
    assert torch.equal(second(None, None), whole(hidden_states(), None))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cuda_graph_impl": "transformer_engine"}, "CUDA graphs of single layers"),
        ({"flash_decode": True}, "flash decoding"),
        ({"mlp_chunks_for_prefill": 2}, "MLPs in chunks"),
        ({"fp8": "e4m3", "recompute_granularity": "full"}, "recomputation in fp8 or fp4"),
    ],
)
def test_what_cannot_be_fused_is_named(changes, reason):
    built = stack_of("*-")
    for name, value in changes.items():
        setattr(built.config, name, value)
    assert built._unfused_because() == reason


def test_a_stack_that_does_not_fuse_says_so_and_computes_the_same(caplog):
    with caplog.at_level(logging.WARNING):
        built = stack_of("*-", changes={"mlp_chunks_for_prefill": 2})
    assert "not fused with norms, because of MLPs in chunks" in caplog.text
    assert torch.equal(built(hidden_states(), None), stack_of("*-")(hidden_states(), None))


def test_another_norm_is_not_fused():
    class OtherNorm(torch.nn.RMSNorm):
        def __init__(self, config, hidden_size, eps):
            super().__init__(hidden_size, eps)

    other = dataclasses.replace(LOCAL, norm=dataclasses.replace(LOCAL.norm, use=OtherNorm))
    built = stack_of("*-", backend=other)
    assert built.unfused_because == "a layer or norm of another kind"
    assert built(hidden_states(), None).isfinite().all()


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_contexts_are_megatrons(recipe, monkeypatch):
    """One round the whole pass for delayed scaling, otherwise one round each layer. TransformerEngine is not needed."""
    opened = []

    def context(config, layer_no=-1, is_init=False):
        opened.append(layer_no)
        return contextlib.nullcontext()

    built = stack_of("*-*")
    monkeypatch.setattr(stack, "get_fp8_context", context)
    monkeypatch.setattr("megatron.core.fp8_utils.get_fp8_context", context)
    built.config.fp8, built.config.fp8_recipe = "e4m3", recipe
    built(hidden_states(), None)
    assert opened == ([-1] if recipe == "delayed" else [0, 1, 2])


def test_parameters_are_megatrons_own():
    """Names and shapes, and the places in a checkpoint."""
    built = stack_of("*-")
    assert {type(layer) for layer in built.layers} == {CompositeLayer}
    assert set(built.state_dict()) >= {
        "layers.0.input_layernorm.weight",
        "layers.0.self_attention.linear_qkv.weight",
        "layers.1.pre_mlp_layernorm.weight",
        "layers.1.mlp.linear_fc2.weight",
        "final_norm.weight",
    }
    metadata = {"dp_cp_group": built.pg_collection.dp_cp}
    saved = stack_of("-", pp_layer_offset=3).sharded_state_dict(sharded_offsets=(), metadata=metadata)
    assert "layers.3.pre_mlp_layernorm.weight" in {value.key for value in saved.values()}


def test_an_empty_stage_survives_the_freeing_of_its_output():
    """Megatron frees a stage's output once it is sent; the previous stage's backward still needs the input."""
    x = hidden_states(requires_grad=True)
    received = x * x
    output = stack_of("", pre_process=True, post_process=False)(received, None)
    torch.testing.assert_close(output, received, rtol=0, atol=0)
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    assert received.numel() == x.numel()
    received.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_the_last_stage_ends_with_the_norm_of_the_spec():
    built = stack_of("-", post_process=True)
    assert isinstance(built.final_norm, LOCAL.norm.use)
    built.final_norm.weight.data.fill_(1)
    output = built(hidden_states(), None)
    torch.testing.assert_close(output.pow(2).mean(-1), torch.ones(8, 2), rtol=1e-3, atol=1e-3)  # eps in the norm


@pytest.mark.parametrize("wish", [{"post_process": False}, {"post_layer_norm": False}])
def test_other_stages_have_no_final_norm(wish):
    assert not hasattr(stack_of("-", **wish), "final_norm")


@pytest.mark.parametrize("unfused", [False, True])
def test_dropout_under_sequence_parallelism_draws_from_the_ranks_own_generator(unfused, generators):
    """Ranks hold different tokens, so they must not share a mask; without it they all see every token, and must."""
    built = stack_of("-", post_process=False, changes={"hidden_dropout": 0.5})
    if unfused:
        built.unfused_because = "this test"

    def output(rank_seed: int) -> torch.Tensor:
        generators.reset()
        generators.add("model-parallel-rng", rank_seed)
        torch.manual_seed(1)  # what the ranks share
        return built(hidden_states(), None)

    assert torch.equal(output(1), output(2))
    built.config.sequence_parallel = True
    assert not torch.equal(output(1), output(2))
    assert torch.equal(output(1), output(1))
