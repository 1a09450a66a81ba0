"""`AdamW`, `adamw_step` and `grad_norm` against their formulas in float64, on a GPU or in Triton's interpreter."""

import copy
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_

from composer_kernels import _adamw, _adamw_op, _multi_tensor
from composer_kernels.adamw import (
    AdamW,
    adamw_step,
    adamw_step_reference,
    clip_scale,
    grad_norm,
    grad_norm_reference,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(37,), (64, 33), (5000,), (0,), (), (3, 5, 7)]
NUMBERS = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def draw(shapes, device, dtype=FP32, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]


def exact(param, grads, lr, betas, eps, weight_decay, maximize=False):
    """Parameter, m and v after these gradients, in float64, written out."""
    p, m, v = param.double(), torch.zeros_like(param, dtype=torch.float64), torch.zeros_like(param, dtype=torch.float64)
    for t, grad in enumerate(grads, 1):
        g = grad.double() * (-1 if maximize else 1)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * weight_decay * p
        p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p, m, v


@pytest.fixture(params=["kernel", "formula"])
def _both_ways(request, monkeypatch):
    """The Triton kernels, and PyTorch's AdamW, which CPUs get."""
    if request.param == "formula":
        monkeypatch.setattr(_adamw_op, "runs_kernel", lambda x: False)


def fresh(params):
    """Zero m, v and steps."""
    return (
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.zeros((), device=p.device) for p in params],
    )


@pytest.mark.usefixtures("_both_ways", "poisoned")
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "copy_dtype"),
    [(FP32, FP32, None), (FP32, BF16, BF16), (FP32, FP32, FP16), (BF16, BF16, None), (FP16, FP32, None)],
)
def test_as_good_as_torch(dtype, grad_dtype, copy_dtype, maximize, device, assert_as_good):
    params = draw(SHAPES, device, dtype)
    grads = [draw(SHAPES, device, grad_dtype, seed) for seed in (1, 2, 3)]
    ours, theirs = [p.clone() for p in params], [p.clone().requires_grad_() for p in params]
    state = fresh(params)
    copies = [torch.full_like(p, torch.nan, dtype=copy_dtype) for p in params] if copy_dtype else None
    peer = torch.optim.AdamW(theirs, **NUMBERS, maximize=maximize)
    for gradients in grads:
        adamw_step(ours, gradients, *state, **NUMBERS, maximize=maximize, copies=copies)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.to(p.dtype)
        peer.step()
    for i, start in enumerate(params):
        wanted = exact(start, [gradients[i] for gradients in grads], **NUMBERS, maximize=maximize)
        their_state = peer.state[theirs[i]]
        pairs = (theirs[i].detach(), their_state["exp_avg"], their_state["exp_avg_sq"])
        for one, two, true in zip((ours[i], state[0][i], state[1][i]), pairs, wanted, strict=True):
            assert_as_good(one, two, true)
        assert state[2][i] == 3
        if copies is not None:
            assert torch.equal(copies[i], ours[i].to(copy_dtype))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 15, 16, 1023, 1024, 4095, 4096, 4097, 9000]), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from([FP32, BF16, FP16]), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_sizes(device, assert_as_good, sizes, dtypes, seed):
    """Blocks end inside, at and beyond the ends of tensors; types differ within a call."""
    params = [draw([n], device, dtype, seed)[0] for n, dtype in zip(sizes, dtypes, strict=False)]
    grads = [draw([n], device, dtype, seed + 1)[0] for n, dtype in zip(sizes, reversed(dtypes), strict=False)]
    ours, reference = [p.clone() for p in params], [p.clone() for p in params]
    adamw_step(ours, grads, *fresh(params), **NUMBERS)
    adamw_step_reference(reference, grads, *fresh(params), **NUMBERS)
    for start, grad, one, two in zip(params, grads, ours, reference, strict=True):
        assert_as_good(one, two, exact(start, [grad], **NUMBERS)[0])
    true = torch.cat([g.double() for g in grads]).norm()
    torch.testing.assert_close(grad_norm(grads).double(), true, rtol=1e-6, atol=0)  # fp32 sums of a few thousand


@pytest.mark.parametrize("step", [1, 2, 1000, 300_000])
def test_bias_corrections_are_exact_at_any_step(step, device, assert_as_good):
    """At β2 = 0.999 fp32 would compute 1 - β2 with an error of 6e-5."""
    (param,), (grad,) = draw([(300,)], device), draw([(300,)], device, seed=1)
    numbers = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    m, v = 0.1 * grad.double(), 0.001 * grad.double() ** 2
    true = param.double() - 0.5 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for steps in (step, [torch.tensor(step - 1.0, device=device)]):
        p, exp_avg, exp_avg_sq = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
        adamw_step([p], [grad], [exp_avg], [exp_avg_sq], steps, **numbers)
        assert_as_good(p - param, (true - param).float(), true - param)


@pytest.mark.parametrize("launch", [_adamw.Launch(16, 1, 4), _adamw.Launch(64, 3, 4), _adamw.Launch(512, 2, 8)])
def test_every_launch_covers_all_elements(launch, device):
    params, grads = draw(SHAPES[:3], device), draw(SHAPES[:3], device, seed=1)
    reference = [p.clone() for p in params]
    adamw_step_reference(reference, grads, *fresh(params), **NUMBERS)
    group = _adamw.Group(params, grads, *fresh(params), [None] * 3, 0.02, (0.8, 0.99), 1e-6, 0.1, False)
    _adamw.launch_update([group], [(0, 0), (0, 1), (0, 2)], None, None, launch)
    torch.testing.assert_close(params, reference, rtol=1e-6, atol=1e-6)  # a few roundings in fp32
    torch.testing.assert_close(_adamw.launch_norm(grads, launch), grad_norm_reference(grads), rtol=1e-6, atol=0)


LAYOUTS = {
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["param", "grad", "both"])
def test_any_layout_gives_the_same_bits(layout, of, device):
    (param,), (grad,) = draw([(48, 30)], device), draw([(48, 30)], device, seed=1)
    wanted = param.clone()
    adamw_step([wanted], [grad], *fresh([wanted]), **NUMBERS)
    ours = LAYOUTS[layout](param) if of != "grad" else param.clone()
    laid_out = LAYOUTS[layout](grad) if of != "param" else grad
    adamw_step([ours], [laid_out], *fresh([ours]), **NUMBERS)
    assert torch.equal(ours, wanted)
    assert torch.equal(grad_norm([laid_out]), grad_norm([grad])) or of != "param"


def test_norms(device):
    grads = [*draw(SHAPES, device, size=3), *draw(SHAPES, device, BF16, 1)]
    true = torch.cat([g.double().flatten() for g in grads]).norm()
    torch.testing.assert_close(grad_norm(grads).double(), true, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_norm_reference(grads).double(), true, rtol=1e-6, atol=0)
    assert torch.equal(grad_norm(grads), grad_norm(grads))
    strided = torch.arange(60.0, device=device).view(6, 10)[:, ::2]
    torch.testing.assert_close(grad_norm([strided]), strided.norm())
    assert grad_norm([]) == 0 == grad_norm([torch.empty(0, device=device)])
    assert grad_norm([*grads, torch.tensor(torch.nan, device=device)]).isnan()
    assert grad_norm([*grads, torch.tensor(torch.inf, device=device)]).isinf()


def models(device, count=2):
    """Equal models with two parameter groups."""
    weights = draw(SHAPES, device)
    copies = [[w.clone().requires_grad_() for w in weights] for _ in range(count)]
    return copies, [[{"params": c[:3], "lr": 0.1}, {"params": c[3:], "weight_decay": 0.0}] for c in copies]


def train(optimizers, weights, steps, seed=0, skipped=()):
    for step in range(steps):
        grads = draw(SHAPES, weights[0][0].device, seed=seed + step + 10)
        for optimizer, params in zip(optimizers, weights, strict=True):
            for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
                param.grad = None if (step, index) in skipped else grad.clone()
            optimizer.step()


def assert_equal_weights(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=2e-7)  # a few roundings in fp32


def test_optimizer_is_torchs_with_steps_of_its_own_for_each_parameter(device):
    weights, groups = models(device)
    ours, theirs = AdamW(groups[0], lr=0.02), torch.optim.AdamW(groups[1], lr=0.02)
    train((ours, theirs), weights, 4, skipped={(1, 0), (2, 4), (3, 4)})
    assert_equal_weights(*weights)
    assert [ours.state[w]["step"].item() for w in weights[0]] == [3, 4, 4, 4, 2, 4]


def test_states_load_into_torchs_and_back(device, tmp_path):
    weights, groups = models(device, 4)
    ours, theirs = AdamW(groups[0], lr=0.02), torch.optim.AdamW(groups[1], lr=0.02)
    train((ours, theirs), weights[:2], 3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    for one, two in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
        assert list(one) == list(two) == ["step", "exp_avg", "exp_avg_sq"]
    torch.save([ours.state_dict(), theirs.state_dict()], tmp_path / "states.pt")
    of_ours, of_theirs = torch.load(tmp_path / "states.pt")
    crossed = AdamW(groups[2], lr=1.0), torch.optim.AdamW(groups[3], lr=1.0)
    for optimizer, state, target, source in zip(crossed, (of_theirs, of_ours), weights[2:], weights, strict=False):
        optimizer.load_state_dict(state)
        for one, two in zip(target, source, strict=True):
            one.data.copy_(two.data)
    train((ours, theirs, *crossed), weights, 3, seed=50)
    for other in weights[1:]:
        assert_equal_weights(weights[0], other)


def test_a_state_with_one_step_tensor_for_all_is_taken_apart(device):
    """Megatron's distributed optimizer writes such states; counted on by each parameter, PyTorch's would run away."""
    weights, groups = models(device)
    ours = AdamW(groups[0])
    train((ours,), weights[:1], 1)
    state = copy.deepcopy(ours.state_dict())
    shared = torch.tensor(1.0)
    for entry in state["state"].values():
        entry["step"] = shared
    other = AdamW(groups[1])
    other.load_state_dict(state)
    train((other,), weights[1:], 1)
    assert {other.state[w]["step"].item() for w in weights[1]} == {2}
    assert shared == 1


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_by_a_scale_is_clipping_of_gradients(max_norm, device):
    weights, groups = models(device)
    ours, theirs = AdamW(groups[0]), torch.optim.AdamW(groups[1])
    for seed in range(2):
        for one, two, grad in zip(*weights, draw(SHAPES, device, seed=seed), strict=True):
            one.grad, two.grad = grad.clone(), grad.clone()
        norm = ours.grad_norm()
        ours.step(scale=clip_scale(norm, max_norm))
        torch.testing.assert_close(norm, clip_grad_norm_(weights[1], max_norm))
        theirs.step()
    assert_equal_weights(*weights)


@pytest.mark.usefixtures("_both_ways")
def test_nothing_changes_where_infinity_was_found(device):
    (weights,), (groups,) = models(device, 1)
    ours = AdamW(groups)
    train((ours,), [weights], 1)
    kept = copy.deepcopy((weights, ours.state_dict()["state"]))
    ours.step(found_inf=torch.tensor([1.0], device=device))
    now = (weights, ours.state_dict()["state"])
    for one, two in zip(kept[0], now[0], strict=True):
        assert torch.equal(one, two)
    for index, state in kept[1].items():
        assert all(torch.equal(value, now[1][index][name]) for name, value in state.items())
    ours.step(found_inf=torch.tensor([0.0], device=device))
    assert ours.state[weights[0]]["step"] == 2


def test_with_a_gradient_scaler(device):
    """It hands scale and found infinities to the optimizer, and backs off."""
    (weights,), (groups,) = models(device, 1)
    ours, scaler = AdamW(groups), torch.amp.GradScaler(device, init_scale=1024.0)
    plain = [w.detach().clone().requires_grad_() for w in weights]
    theirs = torch.optim.AdamW([{**groups[0], "params": plain[:3]}, {**groups[1], "params": plain[3:]}])
    for params, scale in ((weights, scaler.scale), (plain, lambda loss: loss)):
        scale(sum((w**2).sum() for w in params)).backward()
    scaler.step(ours)
    scaler.update()
    theirs.step()
    assert_equal_weights(weights, plain)
    weights[1].grad[0, 0] = torch.inf
    scaler.step(ours)
    scaler.update()
    assert scaler.get_scale() == 512
    assert_equal_weights(weights, plain)


def test_a_16_bit_model_is_trained_by_its_masters(device):
    model = [w.to(BF16).requires_grad_() for w in draw(SHAPES, device)]
    masters = [w.detach().float() for w in model]
    optimizer = AdamW(masters, copies=dict(zip(masters, model, strict=True)), **NUMBERS)
    start, grads = [m.clone() for m in masters], []
    for _ in range(3):
        sum((w.float() ** 2).sum() for w in model).backward()
        grads.append([w.grad.clone() for w in model])
        true = torch.cat([w.grad.double().flatten() for w in model]).norm()
        torch.testing.assert_close(optimizer.grad_norm().double(), true, rtol=1e-6, atol=0)
        optimizer.step()
        optimizer.zero_grad()
        assert all(w.grad is None for w in model)
    for i, (weight, master) in enumerate(zip(model, masters, strict=True)):
        true, _, _ = exact(start[i], [g[i] for g in grads], **NUMBERS)
        torch.testing.assert_close(master.double(), true, rtol=1e-5, atol=1e-6)  # a few roundings in fp32
        assert torch.equal(weight.detach(), master.to(BF16))
    assert all("copies" not in group for group in optimizer.state_dict()["param_groups"])


def test_a_learning_rate_on_the_device_and_a_closure(device):
    weights, groups = models(device)
    lr = torch.tensor(0.02, device=device)
    for group in groups[0]:
        group.pop("lr", None)
    groups[1][0].pop("lr")
    ours, theirs = AdamW(groups[0], lr=lr, capturable=device == "cuda"), torch.optim.AdamW(groups[1], lr=0.02)

    def closure():
        ours.zero_grad()
        loss = sum((w**2).sum() for w in weights[0])
        loss.backward()
        return loss

    assert ours.step(closure) > 0
    sum((w**2).sum() for w in weights[1]).backward()
    theirs.step()
    assert_equal_weights(*weights)
    lr.fill_(0.0)
    before = [w.clone() for w in weights[0]]
    ours.step()
    assert_equal_weights(before, weights[0])


def test_repeated_runs_give_the_same_bits(device):
    results = []
    for _ in range(2):
        (weights,), (groups,) = models(device, 1)
        train((AdamW(groups),), [weights], 3)
        results.append(weights)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_compiled_code_gives_the_same_bits(device):
    def step(params, grads, exp_avgs, exp_avg_sqs, steps, copies):
        scale = clip_scale(grad_norm(grads), 1.0)
        adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr=0.1, scale=scale, copies=copies)

    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        params, grads = draw(SHAPES[:3], device), draw(SHAPES[:3], device, seed=1)
        state = fresh(params)
        copies = [None, params[1].to(BF16), None]
        run(params, grads, *state, copies)
        results.append([*params, *state[0], *state[1], *state[2], copies[1]])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_a_compiled_optimizer_gives_the_same_bits(device):
    weights, groups = models(device)
    eager, compiled = AdamW(groups[0]), AdamW(groups[1])
    compiled_step = torch.compile(compiled.step, backend="eager")
    for seed in range(2):
        for one, two, grad in zip(*weights, draw(SHAPES, device, seed=seed), strict=True):
            one.grad, two.grad = grad, grad.clone()
        eager.step()
        compiled_step()
    for one, two in zip(*weights, strict=True):
        assert torch.equal(one, two)


def test_operators_hold_what_they_promise(device):
    params, grads = draw(SHAPES[:2], device), draw(SHAPES[:2], device, seed=1)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_adamw_op.norm_op, (grads,), test_utils=checks)
    numbers = [0.9, 0.99, 1e-8, 0.1]
    arguments = (params, grads, *fresh(params), [params[0].to(BF16)], [0], 0, 0.1, None, numbers, False, None, None)
    torch.library.opcheck(_adamw_op._step_op, arguments, test_utils=checks)


ONE = torch.ones(2, 8)
STEP = torch.zeros(())
FINE = {"params": [ONE], "grads": [ONE], "exp_avgs": [ONE], "exp_avg_sqs": [ONE], "steps": [STEP], "lr": 0.1}


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "adamw_step: grads is int64", {"grads": [ONE.long()]}),
        (ValueError, "grads must have one entry for each of 1 params; given 2", {"grads": [ONE, ONE]}),
        (ValueError, r"steps must have one entry .*given 0", {"steps": []}),
        (ValueError, r"exp_avgs must be like .*\(2, 8\).*given float32 \(16,\)", {"exp_avgs": [ONE.view(16)]}),
        (ValueError, "exp_avg_sqs must have its parameter's strides", {"exp_avg_sqs": [torch.ones(8, 2).T]}),
        (ValueError, "params must be dense", {"params": [torch.ones(2, 16)[:, ::2]]}),
        (ValueError, "a step must be a float32 scalar .*given int64", {"steps": [STEP.long()]}),
        (ValueError, "steps must be at least 1.*given 0", {"steps": 0}),
        (ValueError, "lr must be at least 0; given -1", {"lr": -1}),
        (ValueError, "eps must be at least 0; given nan", {"eps": float("nan")}),
        (ValueError, r"betas must be .*given \(0.9, 1.0\)", {"betas": (0.9, 1.0)}),
        (ValueError, r"scale must be a floating-point scalar; given float32 \(2, 8\)", {"scale": ONE}),
        (ValueError, "copies must be like .* on meta", {"copies": [ONE.to("meta")]}),
    ],
)
def test_bad_arguments(error, words, changes):
    with pytest.raises(error, match=words):
        adamw_step(**{**FINE, **changes})


def test_bad_optimizers(device):
    param = torch.ones(3, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="amsgrad=True is not supported"):
        AdamW([param], amsgrad=True)
    with pytest.raises(ValueError, match=r"a copy must have the shape.*given bfloat16 \(2,\)"):
        AdamW([param], copies={param: torch.ones(2, dtype=BF16, device=device)})
    other = torch.optim.AdamW([param], amsgrad=True)
    with pytest.raises(NotImplementedError, match="amsgrad"):
        AdamW([param]).load_state_dict(other.state_dict())
    gaps = torch.ones(6, device=device)[::2].requires_grad_()
    gaps.grad = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"params must be dense.*given strides \(2,\)"):
        AdamW([gaps]).step()
    param.grad = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"found_inf must be on c.*given float32 .* on meta"):
        AdamW([param]).step(found_inf=torch.ones((), device="meta"))
    param.grad = torch.ones(3, device=device).to_sparse()
    with pytest.raises(NotImplementedError, match="a gradient is sparse"):
        AdamW([param]).step()
    with pytest.raises(TypeError, match="grad_norm: grads is int64"):
        grad_norm([torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"grads must be on one device; given .*cpu.*meta"):
        grad_norm([torch.ones(2), torch.ones(2, device="meta")])


def test_tables_are_kept_until_addresses_change(device, monkeypatch):
    written = []
    write = _multi_tensor._write_integers

    def count(values, device):
        written.append(values)
        return write(values, device)

    monkeypatch.setattr(_multi_tensor, "_write_integers", count)
    monkeypatch.setattr(_adamw, "tables", _multi_tensor.Tables(8))
    (weights,), (groups,) = models(device, 1)
    ours = AdamW(groups)
    train((ours,), [weights], 1)
    held = [w.grad for w in weights]
    before = len(written)
    ours.step()
    assert len(written) == before > 0
    weights[0].grad = held[0].clone()
    ours.step()
    assert written[before:] == [tuple(w.grad.data_ptr() for w in weights)]


def _move_grads(optimizer, weights):
    for weight in weights:
        weight.grad = weight.grad.clone()


def _transpose_a_grad(optimizer, weights):
    """Its elements stay in place but lie in another order: the address is the same."""
    shape = weights[1].shape
    weights[1].grad = weights[1].grad.contiguous().view(-1).view(shape[1], shape[0]).T


def _move_a_weight(optimizer, weights):
    weights[2].data = weights[2].data.clone()


def _move_a_moment(optimizer, weights):
    state = optimizer.state[weights[0]]
    state["exp_avg"] = state["exp_avg"].clone()


def _reload(optimizer, weights):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _drop_a_grad(optimizer, weights):
    weights[0].grad = None


def _other_numbers(optimizer, weights):
    for group in optimizer.param_groups:
        group |= {"lr": 0.3, "betas": (0.5, 0.6), "weight_decay": 0.3}


CHANGES = {
    "gradients elsewhere": _move_grads,
    "a gradient in another order": _transpose_a_grad,
    "a weight elsewhere": _move_a_weight,
    "a moment elsewhere": _move_a_moment,
    "a state loaded": _reload,
    "a gradient less": _drop_a_grad,
    "other numbers": _other_numbers,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_the_last_step_launched_is_launched_again_only_where_it_fits(change, device, monkeypatch):
    prepared = []
    prepare = _adamw_op.prepare_update
    monkeypatch.setattr(_adamw_op, "prepare_update", lambda *args: prepared.append(args) or prepare(*args))
    weights, groups = models(device)
    optimizers = [AdamW(each, lr=0.02) for each in groups]
    train(optimizers, weights, 1)
    counts = []
    for _ in range(2):
        for optimizer in optimizers:
            if optimizer is optimizers[1]:
                optimizer._memo = _adamw_op.Memo()
            before = len(prepared)
            optimizer.step()
            counts.append(len(prepared) - before)
        if len(counts) == 2:
            for optimizer, params in zip(optimizers, weights, strict=True):
                change(optimizer, params)
    assert counts[0] == 0 < counts[1]
    assert (counts[2] == 0) == (change is _other_numbers)
    for one, two in zip(*weights, strict=True):
        assert torch.equal(one, two)


def test_an_optimizer_holds_no_old_state(device):
    (weights,), (groups,) = models(device, 1)
    ours = AdamW(groups, lr=0.02)
    train((ours,), [weights], 2)
    old = weakref.ref(ours.state[weights[0]]["exp_avg"])
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert old() is None


def test_the_oldest_tables_go(device):
    tables, like = _multi_tensor.Tables(2), torch.zeros(1, device=device)
    first, second, _ = (tables.integers((number, 2**62), like) for number in range(3))
    assert tables.integers((1, 2**62), like) is second
    again = tables.integers((0, 2**62), like)
    assert again is not first
    assert again.tolist() == [0, 2**62]
    assert tables.owners((2, 0, 3), like).tolist() == [0, 0, 2, 2, 2]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
def test_no_host_synchronisation_and_cuda_graph(device):
    """Gradients at other addresses in the graph, a learning rate that changes, and an eager step in between."""
    weights, groups = models(device)
    for group in (*groups[0], *groups[1]):
        group.pop("lr", None)
    lr = torch.tensor(0.02, device=device)
    ours, theirs = AdamW(groups[0], lr=lr, capturable=True), torch.optim.AdamW(groups[1], lr=0.02)

    def step(optimizer, params):
        optimizer.zero_grad()
        sum((w**2).sum() for w in params).backward()
        if optimizer is ours:
            optimizer.step(scale=clip_scale(optimizer.grad_norm(), 1.0))
        else:
            clip_grad_norm_(params, 1.0)
            optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(ours, weights[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(ours, weights[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    ours.zero_grad()
    with torch.cuda.graph(graph):
        step(ours, weights[0])
    lr.fill_(0.05)
    graph.replay()
    captured = [w.grad for w in weights[0]]
    for w in weights[0]:
        w.grad = None
    step(ours, weights[0])
    for w, grad in zip(weights[0], captured, strict=True):
        w.grad = grad
    graph.replay()
    for rate in (0.02, 0.02, 0.05, 0.05, 0.05):
        for group in theirs.param_groups:
            group["lr"] = rate
        step(theirs, weights[1])
    assert_equal_weights(*weights)
    assert ours.state[weights[0][0]]["step"] == 5


@needs_gpu
def test_past_two_to_the_31_elements(device, whole_gpu):
    """The last elements come out as they do alone."""
    whole_gpu(25)  # four tensors, and a part of one in float64
    param, grad, exp_avg, exp_avg_sq = (torch.rand(2**31 + 4096, device=device, dtype=BF16) for _ in range(4))
    tail = [tensor[-4096:].clone() for tensor in (param, grad, exp_avg, exp_avg_sq)]
    adamw_step([param], [grad], [exp_avg], [exp_avg_sq], 1, **NUMBERS)
    adamw_step([tail[0]], [tail[1]], [tail[2]], [tail[3]], 1, **NUMBERS)
    for one, two in zip((param, exp_avg, exp_avg_sq), (tail[0], *tail[2:]), strict=True):
        assert torch.equal(one[-4096:], two)
    whole = sum(part.double().square().sum() for part in grad.split(2**28)).sqrt()
    torch.testing.assert_close(grad_norm([grad]).double(), whole, rtol=1e-5, atol=0)  # fp32 sums
