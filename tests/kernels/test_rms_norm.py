"""`rms_norm` against its formula in float64, on a GPU or in Triton's interpreter."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_kernels import _norm, _norm_op
from composer_kernels._norm import Launch
from composer_kernels.rms_norm import rms_norm, rms_norm_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(0, 64), (1, 1), (3, 37), (13, 128), (5, 1000), (2, 3, 96)]
EPS = 1e-5
WIDE = Launch(block=16, rows=2, warps=4)
"""Handles 16 columns at a time, so that rows of ordinary width are too wide for it."""


def exact(x, weight, dy, zero_centered=False):
    """y, dx and dweight in float64, written out."""
    x, dy = x.double(), dy.double()
    w = torch.ones(x.shape[-1], device=x.device).double() if weight is None else weight.double() + zero_centered
    rstd = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normed = x * rstd
    g = dy * w
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return normed * w, dx, (dy * normed).reshape(-1, x.shape[-1]).sum(0)


def torchs(x, weight, dy, zero_centered=False):
    """The same from PyTorch's own norm in the type of x."""
    x = x.detach().clone().requires_grad_()
    w = torch.ones(x.shape[-1], device=x.device) if weight is None else weight.detach()
    w = w.to(x.dtype).requires_grad_()
    y = F.rms_norm(x, x.shape[-1:], w + 1 if zero_centered else w, EPS)
    y.backward(dy)
    return y, x.grad, w.grad


def draw(shape, dtype, device, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(*shape, generator=generator).to(device, dtype) for _ in range(2))
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(device, weight_dtype or dtype)
    return x.requires_grad_(), weight.requires_grad_(), dy


@pytest.fixture(params=["kernel", "formula"])
def _both_ways(request, monkeypatch):
    """The Triton kernels, and the formula that CPUs get."""
    if request.param == "formula":
        monkeypatch.setattr(_norm_op, "runs_kernel", lambda x: False)


@pytest.mark.usefixtures("_both_ways", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_torch(shape, dtype, device, assert_as_good):
    x, weight, dy = draw(shape, dtype, device)
    y = rms_norm(x, weight, EPS)
    y.backward(dy)
    for ours, theirs, true in zip((y, x.grad, weight.grad), torchs(x, weight, dy), exact(x, weight, dy), strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, theirs, true)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_zero_centred_weight_of_any_type(weight_dtype, device, assert_as_good):
    x, weight, dy = draw((6, 80), torch.bfloat16, device, weight_dtype)
    y = rms_norm(x, weight, EPS, zero_centered=True)
    y.backward(dy)
    true = exact(x, weight, dy, zero_centered=True)
    for ours, theirs, wanted in zip((y, x.grad, weight.grad), torchs(x, weight, dy, True), true, strict=True):
        assert_as_good(ours, theirs, wanted)
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == weight_dtype


@pytest.mark.usefixtures("_both_ways")
def test_no_weight(device, assert_as_good):
    x, _, dy = draw((6, 80), torch.bfloat16, device)
    y = rms_norm(x, eps=EPS)
    y.backward(dy)
    for ours, theirs, true in zip((y, x.grad), torchs(x, None, dy), exact(x, None, dy), strict=False):
        assert_as_good(ours, theirs, true)


@pytest.mark.usefixtures("_both_ways")
def test_frozen_weight_gets_no_gradient(device, assert_as_good):
    x, weight, dy = draw((6, 80), torch.float32, device)
    rms_norm(x, weight.detach(), EPS).backward(dy)
    assert_as_good(x.grad, torchs(x, weight, dy)[1], exact(x, weight, dy)[1])


@pytest.mark.usefixtures("_both_ways")
def test_result_in_another_type(device):
    """From a residual stream in fp32: y is rounded once, and dx comes back in fp32."""
    x, weight, dy = draw((6, 80), torch.float32, device)
    y = rms_norm(x, weight, EPS, out_dtype=torch.bfloat16)
    y.backward(dy.bfloat16())
    true_y, true_dx, _ = exact(x, weight, dy.bfloat16())
    # Half a unit in the last of 8 bits, and what fp32 loses before.
    assert ((y.double() - true_y).abs() <= true_y.abs() * 2**-8).all()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), true_dx, rtol=0, atol=2e-6)  # 16 roundings of numbers near 1


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 64), (7, 37), (5, 80)])
def test_rows_too_wide_for_registers(shape, device, assert_as_good, monkeypatch):
    monkeypatch.setattr(_norm, "forward_launch", lambda width: WIDE)
    monkeypatch.setattr(_norm, "backward_launch", lambda *_: WIDE)
    x, weight, dy = draw(shape, torch.bfloat16, device)
    y = rms_norm(x, weight, EPS)
    y.backward(dy)
    for ours, theirs, true in zip((y, x.grad, weight.grad), torchs(x, weight, dy), exact(x, weight, dy), strict=True):
        assert_as_good(ours, theirs, true)


@pytest.mark.parametrize(
    "launch",
    [Launch(64, 4, 4, pin=False), Launch(64, 1, 8, stages=2, programs=2), Launch(64, 1, 4, programs=3, pin=False)],
)
def test_every_backward_launch_adds_all_rows(launch, device):
    x, weight, dy = draw((29, 48), torch.float32, device)
    _, _, rstd = _norm.launch_forward(x.detach(), None, weight.detach(), EPS, False, torch.float32)
    dx, _, dweight = _norm.launch_backward(dy, None, x.detach(), weight.detach(), rstd, False, True, None, None, launch)
    _, true_dx, true_dweight = exact(x, weight, dy)
    # Sums of 48 and 29 terms near 1 in fp32.
    torch.testing.assert_close(dx.double(), true_dx, rtol=0, atol=3e-6)
    torch.testing.assert_close(dweight.double(), true_dweight, rtol=0, atol=1e-5)


def test_parts_of_more_programs_than_one_load_takes(device, monkeypatch):
    """The kernel that adds the programs' parts reads 512 at a time."""
    monkeypatch.setattr(_norm, "multiprocessors", lambda device: 520)
    x, weight, dy = draw((520, 3), torch.float32, device)
    _, _, rstd = _norm.launch_forward(x.detach(), None, weight.detach(), EPS, False, torch.float32)
    launch = Launch(4, 1, 1)
    _, _, dweight = _norm.launch_backward(dy, None, x.detach(), weight.detach(), rstd, False, True, None, None, launch)
    # A sum of 520 terms near 1 in fp32.
    torch.testing.assert_close(dweight.double(), exact(x, weight, dy)[2], rtol=0, atol=1e-4)


LAYOUTS = {
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "elements apart": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, device):
    x, weight, dy = draw((4, 3, 48), torch.bfloat16, device)
    rms_norm(x, weight, EPS).backward(dy)
    x2, weight2 = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    laid_out, dy2 = LAYOUTS[layout](x2), LAYOUTS[layout](dy)
    assert laid_out.stride() != x2.stride()
    y = rms_norm(laid_out, weight2, EPS)
    y.backward(dy2)
    assert y.is_contiguous()
    assert torch.equal(y, rms_norm(x, weight, EPS))
    assert torch.equal(x2.grad, x.grad)
    assert torch.equal(weight2.grad, weight.grad)


def test_misaligned_memory(device, assert_as_good):
    """A kernel of its own reads narrower words, and so adds in another order."""

    def misaligned(tensor):
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)

    x, weight, dy = draw((5, 48), torch.bfloat16, device)
    assert misaligned(x).data_ptr() % 16
    y = rms_norm(misaligned(x), misaligned(weight), EPS)
    y.backward(misaligned(dy))
    for ours, theirs, true in zip((y, x.grad, weight.grad), torchs(x, weight, dy), exact(x, weight, dy), strict=True):
        assert_as_good(ours, theirs, true)


def test_expanded_gradient(device, assert_as_good):
    """What `sum().backward()` hands over has no memory of its own."""
    x, weight, _ = draw((4, 48), torch.float32, device)
    rms_norm(x, weight, EPS).sum().backward()
    ones = torch.ones_like(x)
    assert_as_good(weight.grad, torchs(x, weight, ones)[2], exact(x, weight, ones)[2])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(rows=st.integers(0, 9), width=st.integers(1, 70), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_shape(device, assert_as_good, rows, width, dtype, seed):
    x, weight, dy = draw((rows, width), dtype, device, torch.float32, seed)
    y = rms_norm(x, weight, EPS)
    y.backward(dy)
    for ours, theirs, true in zip((y, x.grad, weight.grad), torchs(x, weight, dy), exact(x, weight, dy), strict=True):
        assert_as_good(ours, theirs, true)


@pytest.mark.usefixtures("_both_ways")
def test_main_grad_takes_the_unrounded_weight_gradient(device):
    x, weight, dy = draw((9, 48), torch.bfloat16, device)
    before = torch.randn(48, device=device)
    main_grad = before.clone()
    for _ in range(2):
        rms_norm(x, weight, EPS, main_grad=main_grad).backward(dy)
    assert weight.grad is None
    wanted = before.double() + 2 * exact(x, weight, dy)[2]
    torch.testing.assert_close(main_grad.double(), wanted, rtol=0, atol=1e-5)  # 9 terms near 1 in fp32; bf16: 1e-2


def test_megatrons_flag_is_set_and_its_hooks_run(device):
    x, weight, dy = draw((9, 48), torch.bfloat16, device)
    weight.grad_added_to_main_grad = False
    seen = []
    weight.register_hook(seen.append)
    rms_norm(x, weight, EPS, main_grad=torch.zeros(48, device=device)).backward(dy)
    assert weight.grad_added_to_main_grad
    assert seen[0].shape == weight.shape


def test_repeated_runs_give_the_same_bits(device):
    results = []
    for _ in range(2):
        x, weight, dy = draw((23, 96), torch.bfloat16, device)
        y = rms_norm(x, weight, EPS)
        y.backward(dy)
        results.append((y, x.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_second_backward_gives_the_same_and_leaves_the_inputs(device):
    x, weight, dy = draw((5, 48), torch.bfloat16, device)
    kept = x.detach().clone(), weight.detach().clone(), dy.clone()
    y = rms_norm(x, weight, EPS)
    first = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, weight), dy)
    for one, two in zip((*first, x, weight, dy), (*second, *kept), strict=True):
        assert torch.equal(one, two)


def test_differentiating_twice_is_refused(device):
    x, weight, dy = draw((5, 48), torch.float32, device)
    (dx,) = torch.autograd.grad(rms_norm(x, weight, EPS), x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        dx.sum().backward()


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gradient_of_the_formula(zero_centered, device):
    """In float64, where the formula runs, against finite differences; and the reference, twice."""
    x, weight, _ = draw((3, 5), torch.float64, device)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, zero_centered=zero_centered), (x, weight))
    torch.testing.assert_close(
        rms_norm(x, weight, EPS, zero_centered=zero_centered),
        rms_norm_reference(x, weight, EPS, zero_centered=zero_centered),
    )
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm_reference(x, w, EPS), (x, weight))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
def test_nan_and_infinity_stay_in_their_row(device):
    x, weight, _ = draw((4, 48), torch.float32, device)
    with torch.no_grad():
        x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = rms_norm(x, weight, EPS)
    assert y[1].isnan().all()
    assert y[2, 5].isnan()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.usefixtures("poisoned")
def test_without_gradients_the_bits_are_the_same(device):
    x, weight, _ = draw((5, 40), torch.bfloat16, device)
    with torch.no_grad():
        y = rms_norm(x, weight, EPS)
    assert torch.equal(y, rms_norm(x, weight, EPS))


def test_operators_hold_what_they_promise(device):
    x, weight, dy = (tensor.detach() for tensor in draw((3, 24), torch.bfloat16, device))
    rstd = torch.rand(3, device=device)
    main_grad = torch.zeros(24, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_norm_op._forward_op, (x, None, weight, EPS, False, torch.float32), test_utils=checks)
    for target in (None, main_grad):
        arguments = (dy, None, x, weight, rstd, True, True, target, None)
        torch.library.opcheck(_norm_op._backward_op, arguments, test_utils=checks)


def test_compiled_code_gives_the_same_bits(device):
    def twice(x, weight, main_grad):
        return rms_norm(rms_norm(x, weight, EPS), weight, EPS, main_grad=main_grad)

    results = []
    for run in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        x, weight, dy = draw((5, 48), torch.bfloat16, device)
        main_grad = torch.zeros(48, device=device)
        y = run(x, weight, main_grad)
        y.backward(dy)
        results.append((y, x.grad, weight.grad, main_grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "rms_norm: x is int64", (X.long(),)),
        (TypeError, "rms_norm: weight is float64", (X, torch.ones(8).double())),
        (TypeError, "rms_norm: out is float8", (X, None, EPS, {"out_dtype": torch.float8_e4m3fn})),
        (ValueError, r"x must be \(…, H\).*float32 \(\)", (torch.tensor(1.0),)),
        (ValueError, r"x must be .*float32 \(3, 0\)", (torch.ones(3, 0),)),
        (ValueError, r"weight must be \(8,\), .*\(7,\)", (X, torch.ones(7))),
        (ValueError, "weight must be .* on meta", (X, torch.ones(8, device="meta"))),
        (ValueError, "main_grad takes the gradient of a weight", (X, None, EPS, {"main_grad": X[0]})),
        (ValueError, r"main_grad must be float32 \(8,\).*bfloat16", (X, X[0], EPS, {"main_grad": X[0].bfloat16()})),
    ],
)
def test_bad_arguments(error, words, arguments):
    positional = [argument for argument in arguments if not isinstance(argument, dict)]
    named = arguments[-1] if isinstance(arguments[-1], dict) else {}
    with pytest.raises(error, match=words):
        rms_norm(*positional, **named)


@pytest.mark.parametrize("size", [4, 6, 8, 10, 12])
@pytest.mark.parametrize("width", [1, 1536, 4096, 8192, 40000])
def test_backward_launch_fits_small_gpus(width, size):
    """Tiles on their way lie in shared memory, of which GPUs without a data centre have 99 KiB; partial sums too."""
    launch = _norm.backward_launch(width, size)
    weight = 0 if launch.pin else 4  # on its way, too
    scratch = 16 * 1024 if size >= 10 else 0  # what three tensors in fp32 take to change layouts
    assert launch.programs * launch.warps <= 32
    assert (launch.stages - 1) * launch.block * (launch.rows * size + weight) + scratch <= 98 * 1024


@pytest.mark.parametrize(("overlap", "can", "needs_dweight"), list(itertools.product((True, False), repeat=3)))
def test_kernels_overlap_only_where_one_follows_that_waits(overlap, can, needs_dweight, monkeypatch):
    """A first kernel that lets the next one begin early must be followed by the one that waits for its end."""
    launched = []
    for name in ("_backward", "_weight_grad"):
        monkeypatch.setattr(getattr(_norm, name), "launch", lambda *arguments: launched.append(arguments[-2:]))
    monkeypatch.setattr(_norm, "can_overlap", lambda device: can)
    x, weight, dy = (tensor.detach() for tensor in draw((4, 8), torch.float32, "cpu"))
    launch = Launch(8, 1, 4, overlap=overlap)
    _norm.launch_backward(dy, None, x, weight, x[:, 0], False, needs_dweight, None, None, launch)
    wanted = overlap and can and needs_dweight
    assert len(launched) == 1 + needs_dweight
    assert all(constants[-1] is wanted for constants, _ in launched)
    assert "launch_pdl" not in dict(launched[0][1])
    assert ("launch_pdl" in dict(launched[-1][1])) is wanted


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
def test_no_host_synchronisation_and_cuda_graph(device, assert_capturable):
    x, weight, dy = draw((64, 1024), torch.bfloat16, device)

    def step():
        leaves = [each.detach().requires_grad_() for each in (x, weight)]  # their nodes belong to the capturing stream
        y = rms_norm(*leaves, EPS)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    assert_capturable(step)


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_overlapping_kernels_give_the_bits_of_those_in_a_row(captured, device):
    """Beside neighbours that write what they read and read what they write, launched one by one or as a graph."""
    rows, width, rounds = 600, 2048, 20
    x, weight, dy = (tensor.detach() for tensor in draw((rows, width), torch.bfloat16, device, torch.float32))
    _, _, rstd = _norm.launch_forward(x, None, weight, EPS, False, x.dtype)

    def run(overlap):
        launch = replace(_norm.backward_launch(width), overlap=overlap)
        upstream, main_grad = torch.empty_like(dy), torch.empty_like(weight)
        seen = []
        for number in range(rounds):
            torch.mul(dy, number, out=upstream)
            main_grad.fill_(number)
            dx, _, _ = _norm.launch_backward(upstream, None, x, weight, rstd, False, True, main_grad, None, launch)
            seen += [main_grad.clone(), dx.clone()]
            dx.fill_(torch.nan)
        return seen

    wanted, graph = run(False), torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            found = run(True)
        graph.replay()
    else:
        found = run(True)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)


@needs_gpu
def test_past_two_to_the_31_elements(device, whole_gpu):
    """The last rows come out as they do alone."""
    whole_gpu(18)
    x = torch.randn(2**19 + 8, 4096, device=device, dtype=torch.bfloat16)
    weight = torch.rand(4096, device=device)
    y, _, rstd = _norm.launch_forward(x, None, weight, EPS, False, x.dtype)
    assert torch.equal(y[-16:], rms_norm(x[-16:], weight, EPS))
    dx, _, _ = _norm.launch_backward(y, None, x, weight, rstd, False, True, None)
    alone, _, _ = _norm.launch_backward(y[-16:], None, x[-16:], weight, rstd[-16:], False, True, None)
    assert torch.equal(dx[-16:], alone)


@needs_gpu
@pytest.mark.parametrize("width", [1536, 2048, 3072, 4096, 8192, 16384, 40000])
def test_model_widths(width, device, assert_as_good):
    x, weight, dy = draw((300, width), torch.bfloat16, device, torch.float32)
    y = rms_norm(x, weight, EPS)
    y.backward(dy)
    for ours, theirs, true in zip((y, x.grad, weight.grad), torchs(x, weight, dy), exact(x, weight, dy), strict=True):
        assert_as_good(ours, theirs, true)
