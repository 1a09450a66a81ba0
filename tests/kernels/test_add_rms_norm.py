"""`add_rms_norm` against its formula in float64, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from composer_kernels import _norm, _norm_op
from composer_kernels._norm import Launch
from composer_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference

EPS = 1e-5
SHAPES = [(0, 64), (1, 1), (3, 37), (13, 128), (2, 3, 96)]
TYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
]
"""Of x and of the residual stream."""


def draw(shape, dtype, stream, device, seed=0):
    """X, residual, weight, dy, dtotal."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, dy, dtotal = (torch.randn(*shape, generator=generator).to(device) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(device)
    leaves = x.to(dtype), residual.to(stream), weight.to(dtype)
    return *(leaf.requires_grad_() for leaf in leaves), dy.to(dtype), dtotal.to(stream)


def exact(x, residual, weight, dy, dtotal, zero_centered=False):
    """Y, dx = dresidual and dweight in float64, written out, from the total as it is stored."""
    total = (x.float() + residual.float()).to(residual.dtype).double()
    w, dy, dtotal = weight.double() + zero_centered, dy.double(), dtotal.double()
    rstd = (total.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normed, g = total * rstd, dy * w
    dx = dtotal + rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return normed * w, dx, (dy * normed).reshape(-1, x.shape[-1]).sum(0)


def torchs(x, residual, weight, dy, dtotal):
    """Y, dx, dresidual and dweight from PyTorch's own operations in these types."""
    x, residual, weight = (leaf.detach().clone().requires_grad_() for leaf in (x, residual, weight))
    total = x + residual
    y = F.rms_norm(total.to(x.dtype), x.shape[-1:], weight, EPS)
    torch.autograd.backward((y, total), (dy, dtotal))
    return y, x.grad, residual.grad, weight.grad


@pytest.fixture(params=["kernel", "formula"])
def _both_ways(request, monkeypatch):
    """The Triton kernels, and the formula that CPUs get."""
    if request.param == "formula":
        monkeypatch.setattr(_norm_op, "runs_kernel", lambda x: False)


@pytest.mark.usefixtures("_both_ways", "poisoned")
@pytest.mark.parametrize(("dtype", "stream"), TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_torch(shape, dtype, stream, device, assert_as_good):
    x, residual, weight, dy, dtotal = draw(shape, dtype, stream, device)
    y, total = add_rms_norm(x, residual, weight, EPS)
    torch.autograd.backward((y, total), (dy, dtotal))
    assert (y.dtype, total.dtype, x.grad.dtype, residual.grad.dtype) == (dtype, stream, dtype, stream)
    assert torch.equal(total, (x.float() + residual.float()).to(stream))
    true_y, true_dx, true_dweight = exact(x, residual, weight, dy, dtotal)
    ours, true = (y, x.grad, residual.grad, weight.grad), (true_y, true_dx, true_dx, true_dweight)
    for one, theirs, wanted in zip(ours, torchs(x, residual, weight, dy, dtotal), true, strict=True):
        assert_as_good(one, theirs, wanted)


@pytest.mark.parametrize(("dtype", "stream"), TYPES[:2])
def test_rows_too_wide_for_registers(dtype, stream, device, assert_as_good, monkeypatch):
    wide = Launch(block=16, rows=2, warps=4)
    monkeypatch.setattr(_norm, "forward_launch", lambda width: wide)
    monkeypatch.setattr(_norm, "backward_launch", lambda *_: wide)
    x, residual, weight, dy, dtotal = draw((7, 37), dtype, stream, device)
    y, total = add_rms_norm(x, residual, weight, EPS)
    torch.autograd.backward((y, total), (dy, dtotal))
    assert torch.equal(total, (x.float() + residual.float()).to(stream))
    true_y, true_dx, true_dweight = exact(x, residual, weight, dy, dtotal)
    ours, true = (y, x.grad, residual.grad, weight.grad), (true_y, true_dx, true_dx, true_dweight)
    for one, theirs, wanted in zip(ours, torchs(x, residual, weight, dy, dtotal), true, strict=True):
        assert_as_good(one, theirs, wanted)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("used", ["y", "total"])
def test_one_result_unused(used, device):
    """The last norm of a model has no use for the total; its absent gradient costs no tensor of zeros."""
    x, residual, weight, dy, dtotal = draw((6, 48), torch.bfloat16, torch.float32, device)
    y, total = add_rms_norm(x, residual, weight, EPS)
    if used == "y":
        y.backward(dy)
        wanted = exact(x, residual, weight, dy, torch.zeros_like(dtotal))[1]
    else:
        total.backward(dtotal)
        wanted = dtotal.double()
        assert weight.grad is None
    torch.testing.assert_close(residual.grad.double(), wanted, rtol=0, atol=3e-6)  # sums of 48 terms near 1 in fp32
    assert torch.equal(x.grad, residual.grad.bfloat16())


@pytest.mark.usefixtures("_both_ways")
def test_zero_centred_weight_and_main_grad(device):
    x, residual, weight, dy, dtotal = draw((9, 48), torch.bfloat16, torch.bfloat16, device)
    main_grad = torch.ones(48, device=device)
    y, total = add_rms_norm(x, residual, weight, EPS, zero_centered=True, main_grad=main_grad)
    torch.autograd.backward((y, total), (dy, dtotal))
    true_y, true_dx, true_dweight = exact(x, residual, weight, dy, dtotal, zero_centered=True)
    assert weight.grad is None
    torch.testing.assert_close(main_grad.double(), 1 + true_dweight, rtol=0, atol=1e-5)  # 9 terms near 1 in fp32
    # Half a unit in the last of 8 bits, and what fp32 loses before.
    torch.testing.assert_close(y.double(), true_y, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), true_dx, rtol=2**-8, atol=1e-5)


def test_any_layout_gives_the_same_bits(device):
    x, residual, weight, dy, dtotal = draw((4, 3, 48), torch.bfloat16, torch.float32, device)
    wanted = add_rms_norm(x, residual, weight, EPS)
    torch.autograd.backward(wanted, (dy, dtotal))
    grads = x.grad, residual.grad, weight.grad
    x.grad = residual.grad = weight.grad = None

    def apart(tensor):
        return torch.cat((tensor, tensor), -1)[..., :48]

    def permuted(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    got = add_rms_norm(apart(x), permuted(residual), weight, EPS)
    torch.autograd.backward(got, (permuted(dy), apart(dtotal)))
    for one, two in zip((*wanted, *grads), (*got, x.grad, residual.grad, weight.grad), strict=True):
        assert torch.equal(one, two)


def test_second_backward_gives_the_same_and_leaves_the_inputs(device):
    leaves = draw((5, 48), torch.bfloat16, torch.float32, device)
    x, residual, weight, dy, dtotal = leaves
    kept = [leaf.detach().clone() for leaf in leaves]
    results = add_rms_norm(x, residual, weight, EPS)
    totals = results[1].detach().clone()
    first = torch.autograd.grad(results, (x, residual, weight), (dy, dtotal), retain_graph=True)
    second = torch.autograd.grad(results, (x, residual, weight), (dy, dtotal))
    for one, two in zip((*first, *leaves, results[1]), (*second, *kept, totals), strict=True):
        assert torch.equal(one, two)


def test_differentiating_twice_is_refused(device):
    x, residual, weight, dy, dtotal = draw((5, 48), torch.float32, torch.float32, device)
    results = add_rms_norm(x, residual, weight, EPS)
    (dx,) = torch.autograd.grad(results, x, (dy.requires_grad_(), dtotal), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        dx.sum().backward()


def test_a_stack_of_blocks_learns_as_unfused(device):
    """Two blocks and the last norm, residual stream in fp32: gradients meet at each branch."""
    torch.manual_seed(0)
    weights = [torch.rand(32, device=device, requires_grad=True) for _ in range(3)]
    x = torch.randn(6, 32, device=device)

    def loss(add_norm):
        stream, delta = x.clone().requires_grad_(), x.sin()
        for weight in weights:
            normed, stream_out = add_norm(delta, stream, weight, EPS)
            delta, stream = normed.tanh(), stream_out
        return normed.square().sum()

    ours = torch.autograd.grad(loss(add_rms_norm), weights)
    theirs = torch.autograd.grad(loss(add_rms_norm_reference), weights)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # fp32 sums in another order


def test_gradient_of_the_formula(device):
    """In float64, where the formula runs, against finite differences; and the reference, twice."""
    x, residual, weight, _, _ = draw((3, 5), torch.float64, torch.float64, device)
    assert torch.autograd.gradcheck(lambda *leaves: add_rms_norm(*leaves, EPS), (x, residual, weight))
    assert torch.autograd.gradgradcheck(lambda *leaves: add_rms_norm_reference(*leaves, EPS), (x, residual, weight))


def test_compiled_code_gives_the_same_bits(device):
    def twice(x, residual, weight):
        return add_rms_norm(*add_rms_norm(x, residual, weight, EPS), weight, EPS)

    results = []
    for run in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        x, residual, weight, dy, dtotal = draw((5, 48), torch.bfloat16, torch.float32, device)
        y, total = run(x, residual, weight)
        torch.autograd.backward((y, total), (dy, dtotal))
        results.append((y, total, x.grad, residual.grad, weight.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("error", "words", "residual", "weight"),
    [
        (TypeError, "add_rms_norm: residual is int64", X.long(), None),
        (ValueError, r"residual must have the shape .* \(2, 8\) .*given float32 \(2, 4\)", X[:, :4], None),
        (ValueError, "residual must .* on meta", X.to("meta"), None),
        (ValueError, r"add_rms_norm: weight must be \(8,\)", X, X),
    ],
)
def test_bad_arguments(error, words, residual, weight):
    with pytest.raises(error, match=words):
        add_rms_norm(X, residual, weight)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1536, 2048, 3072, 4096, 8192, 16384, 40000])
def test_model_widths(width, stream, device, assert_as_good):
    x, residual, weight, dy, dtotal = draw((300, width), torch.bfloat16, stream, device)
    y, total = add_rms_norm(x, residual, weight, EPS)
    torch.autograd.backward((y, total), (dy, dtotal))
    true_y, true_dx, true_dweight = exact(x, residual, weight, dy, dtotal)
    ours, true = (y, x.grad, residual.grad, weight.grad), (true_y, true_dx, true_dx, true_dweight)
    for one, theirs, wanted in zip(ours, torchs(x, residual, weight, dy, dtotal), true, strict=True):
        assert_as_good(one, theirs, wanted)


@needs_gpu
def test_no_host_synchronisation_and_cuda_graph(device, assert_capturable):
    x, residual, weight, dy, dtotal = draw((64, 1024), torch.bfloat16, torch.float32, device)

    def step():
        leaves = [each.detach().requires_grad_() for each in (x, residual, weight)]  # nodes of the capturing stream
        results = add_rms_norm(*leaves, EPS)
        return (*(each.detach() for each in results), *torch.autograd.grad(results, leaves, (dy, dtotal)))

    assert_capturable(step)
