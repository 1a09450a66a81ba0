"""Scaling and 16-bit copies within our Adam's pass: the same parameters and weights as in Megatron-core's passes."""

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra [train]")

from megatron.core.optimizer import OptimizerConfig, optimizer

from composer_megatron import cpu
from composer_megatron.model import initialize_single_process
from composer_megatron.optimizer import ComposerAdam, TorchAdam, using_optimizer
from composer_megatron.optimizer_step import GradScale

torch.set_num_threads(1)
DEVICE = "cuda" if cpu.has_gpu() else "cpu"


def mixed_precision(kind: type, clip: float):
    """Megatron-core's optimizer on four weights of two groups, one of them in fp32."""
    cpu.prepare_training()
    initialize_single_process()
    generator = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(5, 3, generator=generator).to(DEVICE, torch.bfloat16)) for _ in range(3)]
    weights.append(torch.nn.Parameter(torch.randn(7, generator=generator).to(DEVICE)))
    adam = kind([{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.0}], lr=0.05, weight_decay=0.3)
    config = OptimizerConfig(optimizer="adam", lr=0.05, bf16=True, params_dtype=torch.bfloat16, clip_grad=clip)
    return optimizer.Float16OptimizerWithFloat16Params(adam, config, None, lambda *_: None), weights


def steps(kind: type, clip: float = 0.5, skipped: int | None = None) -> tuple[list, list[torch.Tensor]]:
    """Gradient norms of four steps, and all parameters, weights and moments after them."""
    mixed, weights = mixed_precision(kind, clip)
    generator = torch.Generator().manual_seed(2)
    norms = []
    for number in range(4):
        for weight in weights:
            # Small ones at last, which are not clipped: no factor may be left of the step before.
            size = 1.0 if number < 3 else 1e-3
            weight.main_grad = size * torch.randn(weight.shape, generator=generator).to(DEVICE)
        if number == skipped:
            mixed.prepare_grads()
            mixed.clip_grad_norm(clip)
            continue
        norms.append(float(mixed.step()[1]))
    inner = mixed.optimizer
    mains = [param for group in inner.param_groups for param in group["params"]]
    moments = [inner.state[param][name] for param in mains for name in ("exp_avg", "exp_avg_sq")]
    return norms, [tensor.detach().clone() for tensor in (*weights, *mains, *moments)]


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_steps_are_megatrons(clip: float) -> None:
    wanted_norms, wanted = steps(ComposerAdam, clip)
    with using_optimizer("composer"):
        norms, found = steps(ComposerAdam, clip)
    assert norms == pytest.approx(wanted_norms, rel=1e-6)  # our norm sums in another order
    for one, other in zip(found, wanted, strict=True):
        # fp32: the product with the factor is rounded in another place. bf16: at most one step of the last bit.
        torch.testing.assert_close(one, other, rtol=1e-6 if one.dtype == torch.float32 else 2**-7, atol=1e-7)
    for weight, main in zip(found[:3], found[4:7], strict=True):
        assert torch.equal(weight, main.to(torch.bfloat16))


def test_no_pass_of_its_own_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    monkeypatch.setattr(optimizer, "_multi_tensor_copy_this_to_that", lambda *_, **__: passes.append("copy"))
    with using_optimizer("composer"):
        mixed, weights = mixed_precision(ComposerAdam, 0.5)
        for first in (True, False):  # the first step is our Adam's first sight of these parameters
            for weight in weights:
                weight.main_grad = torch.ones(weight.shape, device=DEVICE)
            _, norm, _ = mixed.step()
            assert isinstance(norm, torch.Tensor)  # which nobody has waited for
            scaled = [bool((weight.main_grad != 1).any()) for weight in weights]
            assert scaled == [first] * len(weights)
        assert passes == []
        assert mixed.optimizer.copies == {}
        mixed._copy_main_params_to_model_params()  # outside a step Megatron-core copies as ever
        assert passes == ["copy"]


def test_a_step_left_out_leaves_nothing_behind() -> None:
    """Where the norm is too large, Megatron-core clips and does not step: the next factor is the next step's."""
    wanted_norms, wanted = steps(ComposerAdam, skipped=2)
    with using_optimizer("composer"):
        norms, found = steps(ComposerAdam, skipped=2)
    assert norms == pytest.approx(wanted_norms, rel=1e-6)  # our norm sums in another order
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6 if one.dtype == torch.float32 else 2**-7, atol=1e-7)


def test_another_adam_is_served_by_megatron() -> None:
    wanted_norms, wanted = steps(TorchAdam)
    with using_optimizer("composer"):
        norms, found = steps(TorchAdam)
    assert norms == pytest.approx(wanted_norms, rel=1e-6)  # our norm sums in another order
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6 if one.dtype == torch.float32 else 2**-7, atol=1e-7)


def test_parameters_may_have_factors_of_their_own() -> None:
    params = [torch.zeros(2) for _ in range(3)]
    grads = [torch.ones(2) for _ in range(3)]
    assert not GradScale.left_to_adam(params)
    GradScale.reset(params)
    assert GradScale.left_to_adam(params)
    GradScale.put(params[:2], 0.5)
    assert GradScale.take(params, grads) is None
    assert [grad.tolist() for grad in grads] == [[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]]
    assert GradScale.take(params, grads) is None  # taken
    GradScale.put(params, 0.25)
    assert float(GradScale.take(params, grads)) == 0.25
    assert grads[0].tolist() == [0.5, 0.5]
