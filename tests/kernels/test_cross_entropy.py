"""Cross entropy against its formula in float64, whole and split over the vocabulary."""

import os
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_kernels import _cross_entropy
from composer_kernels._cross_entropy import Launch, LossTerms
from composer_kernels.cross_entropy import cross_entropy, cross_entropy_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = {}
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
WITHOUT_GPU = "needs a CUDA GPU"


def same_in_torch(logits, target, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"):
    """What PyTorch makes of it in the dtype of the logits throughout."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    if z_loss:
        loss = loss + torch.where(target == ignore_index, 0, z_loss * logits.logsumexp(-1).square())
    kept = (target != ignore_index).sum().clamp(min=1)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept}[reduction]


def run(function, logits, target, upstream=1.0, **options):
    """Loss and gradient by the logits, both in float64 on the CPU."""
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf * 1, target, **options)  # what `inplace` overwrites is no leaf
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    return loss.detach().double().cpu(), leaf.grad.double().cpu()


def distance(x, exact):
    return ((x - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def check(logits, target, inplace=(False, True), **options):
    """The error is at most twice that of PyTorch in the same dtype, or one rounding of the exact result."""
    exact = run(cross_entropy_reference, logits.double(), target, 1.5, **options)
    peer = run(same_in_torch, logits, target, 1.5, **options)
    # A gradient is rounded at most twice: when it is stored, and when the upstream gradient scales it in place.
    # 4e-6 is fp32's exp of a difference of 20; 1 - tanh² of a softcap cancels all but a hundredth.
    rounding = max(torch.finfo(logits.dtype).eps, 4e-6 if options.get("softcap") is None else 2e-5)
    for where in inplace:
        ours = run(cross_entropy, logits, target, 1.5, inplace=where, **options)
        # The loss: fp32 sums of numbers of its size; where several rows cancel, of theirs (at most 20 here).
        assert (ours[0] - exact[0]).abs().max() <= 2 * (peer[0] - exact[0]).abs().max() + 20 * 3e-7
        assert distance(ours[1], exact[1]) <= max(2 * distance(peer[1], exact[1]), rounding)


def data(rows, vocab, dtype, device, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    target = torch.randint(vocab, (rows,), generator=generator)
    target[1::3] = -100
    return logits.to(device), target.to(device)


@pytest.mark.parametrize("options", [PLAIN, EVERYTHING, {"softcap": 30.0, "reduction": "sum"}, {"reduction": "none"}])
@pytest.mark.parametrize("shape", [(5, 33), (3, 4096), (3, 5001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(device, dtype, shape, options):
    check(*data(*shape, dtype, device), **options)


@settings(deadline=None, max_examples=30, database=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(2, 700),
    dtype=st.sampled_from(DTYPES),
    smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    softcap=st.sampled_from([None, 2.0]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    inplace=st.booleans(),
    ignored=st.sampled_from([-100, 1]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_option(rows, vocab, dtype, smoothing, z_loss, softcap, reduction, inplace, ignored, seed):
    device = "cuda" if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET") else "cpu"
    logits, target = data(rows, vocab, dtype, device, seed=seed)
    target[target == -100] = ignored
    if rows:
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "ignore_index": ignored}
        check(logits, target, **options, reduction=reduction, inplace=(inplace,))
    else:
        loss = cross_entropy(logits.requires_grad_() * 1, target, reduction=reduction, inplace=inplace)
        assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0
        loss.sum().backward()
        assert logits.grad.shape == (0, vocab)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_anywhere_in_memory(device, inplace):
    flat, target = data(6, 41, torch.float32, device)
    target[3] = 40
    exact = run(cross_entropy_reference, flat.double(), target)
    storage = torch.full((6, 50), 7.0, device=device)
    odd = torch.full((6 * 43 + 1,), 7.0, device=device)
    layouts = {
        "padded rows": storage[:, 3:44],
        "unaligned": odd[1:].view(6, 43)[:, :41],
        "every second row": torch.full((12, 41), 7.0, device=device)[::2],
        "two leading dimensions": torch.empty(2, 3, 41, device=device),
        "permuted": torch.empty(3, 2, 41, device=device).transpose(0, 1),
        "three leading dimensions": torch.empty(1, 2, 3, 41, device=device),
    }
    for name, logits in layouts.items():
        logits.copy_(flat.view(logits.shape))
        leaf = logits.requires_grad_()
        loss = cross_entropy(leaf, target.view(logits.shape[:-1]), inplace=inplace)
        loss.backward()
        assert loss.item() == pytest.approx(exact[0].item(), rel=1e-6), name
        assert distance(leaf.grad.reshape(6, 41).double().cpu(), exact[1]) < 4e-6, name
        if inplace:
            assert torch.equal(leaf.detach(), leaf.grad), name  # the gradient is where the logits were
    assert (storage[:, :3] == 7).all() and (storage[:, 44:] == 7).all() and odd[0] == 7
    assert (odd[1:].view(6, 43)[:, 41:] == 7).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_gradients_the_bits_are_the_same(device, reduction):
    logits, target = data(6, 50, torch.bfloat16, device)
    with torch.no_grad():
        loss = cross_entropy(logits.view(2, 3, 50), target.view(2, 3), reduction=reduction)
    wanted = cross_entropy(logits.requires_grad_(), target, reduction=reduction)
    assert not loss.requires_grad
    assert wanted.requires_grad
    assert torch.equal(loss.flatten(), wanted.flatten())


def test_labels_in_another_order_and_type(device):
    logits, target = data(6, 20, torch.float32, device)
    expected = cross_entropy(logits, target)
    permuted = target.view(2, 3).t().contiguous().t()
    assert not permuted.is_contiguous()
    assert torch.equal(cross_entropy(logits.view(2, 3, 20), permuted), expected)
    assert torch.equal(cross_entropy(logits, target.int()), expected)
    assert torch.equal(cross_entropy(logits[0], target[0]), cross_entropy(logits[:1], target[:1]))


def test_offsets_beyond_31_bits(device, whole_gpu):
    whole_gpu(6)
    # Untouched zero pages cost nothing: the two rows lie 2^31 elements and some apart.
    gap = 2**31 + 48
    if device == "cpu":
        storage = torch.from_numpy(np.zeros(gap + 64, np.uint16)).view(torch.bfloat16)
    else:
        storage = torch.zeros(gap + 64, dtype=torch.bfloat16, device=device)
    rows = storage.as_strided((2, 33), (gap, 1))
    values, target = data(2, 33, torch.bfloat16, device)
    rows.copy_(values)
    target[:] = 5
    # The far rows are aligned otherwise, so that a GPU adds in another order: fp32 rounding.
    torch.testing.assert_close(cross_entropy(rows, target), cross_entropy(values, target), rtol=1e-6, atol=0)
    for reduction in ("sum", "none"):
        rows.copy_(values)
        leaf = rows.detach().requires_grad_()
        cross_entropy(leaf, target, inplace=True, reduction=reduction).sum().backward()
        exact = run(cross_entropy_reference, values.double(), target, reduction="sum")[1]
        assert distance(rows.double().cpu(), exact) < 4e-3


@pytest.mark.parametrize("options", [PLAIN, {**EVERYTHING, "inplace": True}, {"inplace": True, "reduction": "none"}])
def test_ignored_rows_count_for_nothing(device, options):
    logits, target = data(6, 37, torch.float32, device)
    logits[target == -100] = torch.nan
    loss, gradient = run(cross_entropy, logits, target, **options)
    kept = (target != -100).cpu()
    alone = run(cross_entropy, logits[target != -100], target[target != -100], **options)
    assert torch.allclose(loss[kept] if loss.dim() else loss, alone[0], rtol=1e-6)
    assert torch.allclose(gradient[kept], alone[1], rtol=1e-6) and (gradient[~kept] == 0).all()
    target[:] = -100
    loss, gradient = run(cross_entropy, logits, target, **options)
    assert (loss == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_one_column_is_certain(device, inplace):
    logits, target = data(5, 1, torch.float32, device)
    loss, gradient = run(cross_entropy, logits, target, inplace=inplace)
    assert loss.abs() < 1e-7 and (gradient.abs() < 1e-6).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_impossible_labels_give_nan(device, inplace):
    logits, target = data(4, 37, torch.float32, device)
    target[:] = torch.tensor([3, 37, -1, 36], device=device)
    loss, gradient = run(cross_entropy, logits, target, reduction="sum", inplace=inplace)
    assert loss.isnan() and gradient.isnan().any(1).tolist() == [False, True, True, False]
    loss, gradient = run(cross_entropy, logits, target, reduction="none", inplace=inplace)
    assert loss.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of infinities
@pytest.mark.parametrize("inplace", [False, True])
def test_extreme_logits(device, inplace):
    logits, target = data(6, 70, torch.float32, device)
    target[:] = 5
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, 10:60] = -torch.inf
    logits[3, 5] = -torch.inf
    logits[4, 7] = torch.inf
    logits[5] = -torch.inf
    ours = run(cross_entropy, logits, target, reduction="none")
    torchs = run(F.cross_entropy, logits, target, reduction="none")
    # At 1e4 neighbouring floats are 1e-3 apart, in the logits that both are given.
    assert torch.allclose(ours[0], torchs[0], rtol=1e-6, equal_nan=True)
    assert torch.allclose(ours[1], torchs[1], rtol=1e-5, atol=1e-9, equal_nan=True)
    if inplace:
        assert torch.allclose(run(cross_entropy, logits, target, inplace=True)[1], torchs[1] / 6, 1e-5, 1e-9, True)


def test_upstream_gradients(device):
    logits, target = data(5, 40, torch.float32, device)
    weights = torch.randn(5)
    ours = run(cross_entropy, logits, target, weights, reduction="none")
    assert distance(ours[1], run(cross_entropy_reference, logits.double(), target, weights, reduction="none")[1]) < 4e-6
    for inplace in (False, True):
        scaled = run(cross_entropy, logits, target, 1024.0, inplace=inplace)[1]
        assert torch.equal(scaled, 1024 * run(cross_entropy, logits, target, inplace=inplace)[1])
        zero = run(cross_entropy, logits, target, 0.0, inplace=inplace)[1]
        assert (zero == 0).all()


def test_in_place_means_in_place(device):
    logits, target = data(4, 50, torch.float32, device)
    gradient = run(cross_entropy, logits, target)[1]
    overwritten = logits.clone().requires_grad_() * 1
    cross_entropy(overwritten, target, inplace=True)
    assert torch.allclose(overwritten.detach().double().cpu(), gradient, rtol=1e-5, atol=1e-8)
    untouched = logits.clone().requires_grad_() * 1
    loss = cross_entropy(untouched, target, inplace=True, reduction="none")
    assert torch.equal(untouched, logits)
    loss.mean().backward()
    assert not torch.equal(untouched, logits)
    assert torch.equal(cross_entropy(logits, target, inplace=True), cross_entropy(logits, target))  # no gradient wanted


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_backward(device, reduction):
    logits, target = data(4, 50, torch.float32, device)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)
    loss = cross_entropy(leaf * 1, target, reduction=reduction, inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second time.*inplace=True"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_others_who_need_the_logits_are_told(device, reduction):
    logits, target = data(4, 50, torch.float32, device)
    used = logits.requires_grad_().exp()  # exp saves its result for its own backward
    loss = cross_entropy(used, target, reduction=reduction, inplace=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_of_the_gradient(device):
    logits, target = data(4, 50, torch.float32, device)
    leaf = logits.requires_grad_()
    for options in (PLAIN, {"inplace": True}, {"reduction": "none"}):
        loss = cross_entropy(leaf * 1, target, **options).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="cross_entropy: its gradient cannot be differentiated"):
            (leaf.sum() + gradient.square().sum()).backward()


def test_equal_calls_give_equal_bits(device):
    logits, target = data(9, 5000, torch.bfloat16, device)
    first = run(cross_entropy, logits, target, **EVERYTHING)
    again = run(cross_entropy, logits, target, **EVERYTHING)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_equal_the_whole(device, shards, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(_cross_entropy, "runs_kernel", lambda x: False)
    vocab, width = 132, 132 // shards
    logits, target = data(7, vocab, torch.float32, device)
    scale = torch.linspace(0.5, 2, 7, device=device)
    exact = run(cross_entropy_reference, logits.double(), target, scale.cpu(), reduction="none", **EVERYTHING)
    terms = [LossTerms(-100, 0.1, 1e-3, 5.0, start, vocab) for start in range(0, vocab, width)]
    parts = [logits[:, t.start : t.start + width][None] for t in terms]
    said = [_cross_entropy.statistics(x, target, t) for x, t in zip(parts, terms, strict=True)]
    loss, norm = _cross_entropy.finish(torch.stack(said), target, terms[0])
    assert torch.allclose(loss.double().cpu(), exact[0], rtol=2e-6)
    for x, t in zip(parts, terms, strict=True):
        out = torch.full((1, 7, width), torch.nan, device=device)
        _cross_entropy.gradient_into(out, x, target, norm, scale, t)
        assert distance(out[0].double().cpu(), exact[1][:, t.start : t.start + width]) < 4e-6


@pytest.mark.parametrize(
    "launch",
    [Launch(1, 1), Launch(2, 4), Launch(4, 2, "evict_last"), Launch(1, 1, keep=1), Launch(1, 2, "", 3, "evict_first")],
)
@pytest.mark.parametrize("vocab", [130, 1024, 2051])
def test_every_launch_computes_the_same(device, vocab, launch):
    logits, target = data(4, vocab, torch.float32, device)
    terms, scale = LossTerms(-100, 0.1, 1e-3, 5.0, 0, vocab), torch.full((1,), 0.7, device=device)
    exact = run(cross_entropy_reference, logits.double(), target, 0.7, reduction="none", **EVERYTHING)
    said = _cross_entropy.statistics(logits[None], target, terms, launch)
    loss, norm = _cross_entropy.finish(said[None], target, terms)
    two, one = torch.full_like(logits, torch.nan)[None], torch.full_like(logits, torch.nan)[None]
    _cross_entropy.gradient_into(two, logits[None], target, norm, scale, terms, launch)
    losses = _cross_entropy.loss_and_gradient_into(one, logits[None], target, scale, terms, launch)
    for value in (loss, losses):
        assert torch.allclose(value.double().cpu(), exact[0], rtol=2e-6)
    for value in (one, two):
        assert distance(value[0].double().cpu(), exact[1]) < 4e-6


def test_plain_formulas_match_float64(device, monkeypatch):
    monkeypatch.setattr(_cross_entropy, "runs_kernel", lambda x: False)
    for dtype in DTYPES:
        check(*data(5, 33, dtype, device), **EVERYTHING)


def test_gradcheck():
    logits, target = data(4, 9, torch.float64, "cpu")
    leaf = logits.requires_grad_()
    for reduction in ("none", "mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda x, r=reduction: cross_entropy(x, target, **EVERYTHING, reduction=r), leaf
        )
        plain = cross_entropy_reference(leaf, target, **EVERYTHING, reduction=reduction)
        assert torch.allclose(cross_entropy(leaf, target, **EVERYTHING, reduction=reduction), plain, rtol=1e-12)


@pytest.mark.parametrize("options", [PLAIN, {**EVERYTHING, "inplace": True}, {"reduction": "none", "inplace": True}])
def test_compiled_without_a_break(device, options):
    logits, target = data(4, 50, torch.float32, device)
    eager = run(cross_entropy, logits, target, **options)
    torch.compiler.reset()
    compiled = run(torch.compile(cross_entropy, fullgraph=True, backend="aot_eager"), logits, target, **options)
    assert all(torch.allclose(x, y, rtol=1e-6, atol=1e-9) for x, y in zip(eager, compiled, strict=True))


def test_operators_keep_their_promises():
    logits, target = data(3, 5, torch.float64, "cpu")
    terms = LossTerms(-100, 0.1, 1e-3, 5.0, 0, 5).pack()
    operators = torch.ops.composer_kernels
    _, norm = operators.cross_entropy_forward(logits[None], target, "", terms)
    scale = torch.ones(1, dtype=torch.float64)
    for operator, arguments in (
        (operators.cross_entropy_forward, (logits[None], target, "", terms)),
        (operators.cross_entropy_gradient, (logits[None], target, norm, scale, terms)),
        (operators.cross_entropy_one_pass, (logits[None], target, scale, terms)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "logits are int64"),
        ({"target": torch.zeros(3)}, TypeError, "target is float32"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target is int64 \(4,\)"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "at least one column"),
        ({"logits": torch.zeros(5, 3).t()}, ValueError, r"strides \(1, 3\).*contiguous"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "target is on meta"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; accepted are 'none', 'mean', 'sum'"),
    ],
)
def test_mistakes_are_named(change, error, words):
    arguments = {"logits": torch.zeros(3, 5), "target": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(error, match=f"cross_entropy: .*{words}"):
        cross_entropy(arguments.pop("logits"), arguments.pop("target"), **arguments)


def test_too_permuted():
    logits = torch.zeros(2, 3, 4, 5).permute(2, 1, 0, 3)
    with pytest.raises(ValueError, match="at most two leading dimensions in permuted order"):
        cross_entropy(logits, torch.zeros(4, 3, 2, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT_GPU)
@pytest.mark.parametrize("options", [PLAIN, {**EVERYTHING, "inplace": True}, {"reduction": "none", "inplace": True}])
def test_graph_capture_and_no_synchronisation(options):
    logits, target = data(64, 1000, torch.bfloat16, "cuda")
    expected = run(cross_entropy, logits, target, **options)
    static = torch.zeros_like(logits)

    def step():
        leaf = static.clone().requires_grad_()
        loss = cross_entropy(leaf, target, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), gradient

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    static.copy_(logits)
    graph.replay()
    assert torch.equal(loss.double().cpu(), expected[0]) and torch.equal(gradient.double().cpu(), expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT_GPU)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_than_31_bits_of_elements(reduction, whole_gpu):
    whole_gpu(12)
    rows, vocab = 16500, 131072
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.randint(vocab, (rows,), device="cuda")
    last = run(cross_entropy_reference, logits[-4:].double(), target[-4:], reduction="none")
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, target, reduction=reduction, inplace=True)
    loss.sum().backward()
    gradient = leaf.grad[-4:].double().cpu() * (rows if reduction == "mean" else 1)
    assert distance(gradient, last[1]) < 4e-3
    assert loss.mean().item() == pytest.approx(np.log(vocab) + 0.5, abs=0.1)  # lse of that many standard normals


def test_split_over_processes(run_alone):
    """Run this file's `main`: 4 processes on the CPU; each check is made in groups of 2 and of 4."""
    run_alone(__file__)


def check_group(rank, size, group):
    """One process's part of the loss and the gradient are the whole's; one collective; the same when compiled."""
    calls = []
    gather = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *args, **kwargs: calls.append(args[1].shape) or gather(*args, **kwargs)
    columns = slice(rank * 132 // size, (rank + 1) * 132 // size)
    for dtype in (torch.float32, torch.bfloat16):
        for options in (PLAIN, {**EVERYTHING, "reduction": "none"}, {"reduction": "sum", "inplace": True}):
            logits, target = data(7, 132, dtype, "cpu")
            whole = run(cross_entropy, logits, target, 1.5, **options)
            calls.clear()
            part = run(cross_entropy, logits[:, columns].contiguous(), target, 1.5, group=group, **options)
            assert calls == [(7, 4 if "label_smoothing" in options else 3)], calls
            assert torch.allclose(part[0], whole[0], rtol=1e-6), (part[0], whole[0])
            # Sums in another order may move a bfloat16 gradient to its neighbour.
            tolerance = 1e-6 if dtype == torch.float32 else 1e-3
            assert distance(part[1], whole[1][:, columns]) < tolerance
    assert cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), group=group) == 0
    dist.all_gather_into_tensor = gather
    if size == 2:
        logits, target = data(7, 132, torch.float32, "cpu")
        shard = logits[:, columns].contiguous()
        compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
        results = [run(f, shard, target, group=group, reduction="none") for f in (cross_entropy, compiled)]
        assert all(torch.allclose(x, y, rtol=1e-6) for x, y in zip(*results, strict=True))


def process(rank, store):
    """One of the 4 processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    if rank < 2:
        check_group(rank, 2, pair)
    else:
        with pytest.raises(ValueError, match="group does not contain this process"):
            cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), group=pair)
    check_group(rank, 4, dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(process, (f"{folder}/store",), nprocs=4, start_method="fork")
