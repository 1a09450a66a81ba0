"""`swiglu` against its formula in float64, on a GPU or in Triton's interpreter."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_kernels.swiglu import swiglu, swiglu_reference

op = importlib.import_module("composer_kernels.swiglu")  # the package's attribute of that name is the function
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(0, 64), (1, 1), (3, 37), (5, 600), (2, 3, 96)]
LIMIT = 0.7


def exact(gate, up, dy, limit=None):
    """Y, dgate and dup in float64, written out."""
    gate, up, dy = gate.double(), up.double(), dy.double()
    gate_free, up_free = torch.ones_like(gate), torch.ones_like(up)
    if limit is not None:
        gate_free, up_free = (gate <= limit).double(), (up.abs() <= limit).double()
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = 1 / (1 + torch.exp(-gate))
    return gate * s * up, dy * up * (s + gate * s * (1 - s)) * gate_free, dy * gate * s * up_free


def torchs(gate, up, dy, limit=None):
    """The same from PyTorch's own operations in the type of gate."""
    gate, up = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    g, u = (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))
    y = F.silu(g) * u
    y.backward(dy)
    return y, gate.grad, up.grad


def draw(shape, dtype, device, seed=0):
    """Gate and up side by side, and dy."""
    generator = torch.Generator().manual_seed(seed)
    packed = 2 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    return packed.to(device, dtype), torch.randn(*shape, generator=generator).to(device, dtype)


def run(packed, dy, apart, limit=None):
    """Y, dgate and dup of ours."""
    if apart:
        gate, up = (half.detach().requires_grad_() for half in packed.chunk(2, -1))
        y = swiglu(gate, up, limit=limit)
        y.backward(dy)
        return y, gate.grad, up.grad
    packed = packed.detach().requires_grad_()
    y = swiglu(packed, limit=limit)
    y.backward(dy)
    return y, *packed.grad.chunk(2, -1)


@pytest.fixture(params=["kernel", "formula"])
def _both_ways(request, monkeypatch):
    """The Triton kernels, and the formula that CPUs get."""
    if request.param == "formula":
        monkeypatch.setattr(op, "runs_kernel", lambda x: False)


@pytest.mark.usefixtures("_both_ways", "poisoned")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_torch(shape, dtype, limit, apart, device, assert_as_good):
    packed, dy = draw(shape, dtype, device)
    gate, up = packed.chunk(2, -1)
    ours = run(packed, dy, apart, limit)
    theirs, true = torchs(gate, up, dy, limit), exact(gate, up, dy, limit)
    for one, two, wanted in zip(ours, theirs, true, strict=True):
        assert one.dtype == dtype
        assert_as_good(one, two, wanted)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    apart=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(device, assert_as_good, rows, width, dtype, apart, seed):
    packed, dy = draw((rows, width), dtype, device, seed)
    gate, up = packed.chunk(2, -1)
    for one, two, wanted in zip(run(packed, dy, apart), torchs(gate, up, dy), exact(gate, up, dy), strict=True):
        assert_as_good(one, two, wanted)


def test_packed_equals_apart_to_the_bit(device):
    packed, dy = draw((5, 96), torch.bfloat16, device)
    for one, two in zip(run(packed, dy, False), run(packed, dy, True), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("launch", [op.Launch(16, 1, 4), op.Launch(64, 4, 4), op.Launch(128, 2, 8)])
def test_every_launch_covers_all_elements(launch, device):
    packed, dy = draw((7, 72), torch.float32, device)
    true = exact(*packed.chunk(2, -1), dy)
    y = op.launch_forward(packed, None, None, launch)
    dgate, dup = op.launch_backward(dy, packed, None, None, launch)[0].chunk(2, -1)
    for one, wanted in zip((y, dgate, dup), true, strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-5, atol=1e-6)  # a few roundings in fp32


@pytest.mark.parametrize("choose", [op.forward_launch, op.backward_launch])
@pytest.mark.parametrize("width", [1, 37, 512, 768, 3072, 4096, 8192, 11008, 14336, 28672])
def test_default_launches_waste_at_most_a_quarter(width, choose):
    launch = choose(width)
    covered = -(-width // launch.block) * launch.block
    assert covered < 2 * width
    assert width < 512 or covered <= width * 4 / 3


LAYOUTS = {
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "elements apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, apart, device):
    packed, dy = draw((4, 3, 48), torch.bfloat16, device)
    laid_out = LAYOUTS[layout](packed), LAYOUTS[layout](dy)
    for one, two in zip(run(packed, dy, apart), run(*laid_out, apart), strict=True):
        assert torch.equal(one, two)


def test_one_tensor_as_both(device):
    """X · silu(x) is no packed input."""
    x = torch.randn(3, 48, device=device, requires_grad=True)
    y = swiglu(x, x)
    y.backward(torch.ones_like(y))
    true, dgate, dup = exact(x, x, torch.ones_like(x))
    torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-6)  # a few roundings in fp32
    torch.testing.assert_close(x.grad.double(), dgate + dup, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # NumPy's
def test_far_values_and_nan(device):
    gate = torch.tensor([-200.0, 200.0, torch.nan, 1.0, 60000.0], device=device)
    up = torch.tensor([3.0, 3.0, 1.0, torch.nan, 2.0], device=device)
    assert swiglu(gate, up).tolist()[:2] == [0.0, 600.0]
    limited = swiglu(gate, up, limit=LIMIT)
    assert limited.isnan().tolist() == [False, False, True, True, False]


def test_second_backward_gives_the_same_and_leaves_the_inputs(device):
    packed, dy = draw((5, 48), torch.bfloat16, device)
    kept = packed.clone(), dy.clone()
    y = swiglu(packed.requires_grad_())
    (first,) = torch.autograd.grad(y, packed, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, packed, dy)
    for one, two in zip((first, packed, dy), (second, *kept), strict=True):
        assert torch.equal(one, two)


def test_differentiating_twice_is_refused(device):
    packed, dy = draw((5, 48), torch.float32, device)
    (grad,) = torch.autograd.grad(swiglu(packed.requires_grad_()), packed, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        grad.sum().backward()


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_gradient_of_the_formula(limit, device):
    """In float64, where the formula runs, against finite differences; and the reference, twice."""
    packed, _ = draw((3, 5), torch.float64, device)
    gate, up = (half.clone().requires_grad_() for half in packed.chunk(2, -1))
    packed.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: swiglu(x, limit=limit), packed)
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, limit=limit), (gate, up))
    torch.testing.assert_close(swiglu(packed, limit=limit), swiglu_reference(gate, up, limit=limit))
    assert torch.autograd.gradgradcheck(swiglu_reference, (gate, up))


def test_operators_hold_what_they_promise(device):
    packed, dy = draw((3, 24), torch.bfloat16, device)
    checks = ("test_schema", "test_faketensor")
    for gate, up in ((packed, None), packed.chunk(2, -1)):
        torch.library.opcheck(op._forward_op, (gate, up, None), test_utils=checks)
        torch.library.opcheck(op._backward_op, (dy, gate, up, LIMIT), test_utils=checks)


def test_compiled_code_gives_the_same_bits(device):
    def mlp(packed):
        return swiglu(torch.cat((swiglu(packed), swiglu(*packed.chunk(2, -1), limit=LIMIT)), -1))

    results = []
    for run_mlp in (mlp, torch.compile(mlp, backend="aot_eager", fullgraph=True)):
        packed, dy = draw((5, 48), torch.bfloat16, device)
        y = run_mlp(packed.requires_grad_())
        y.backward(dy)
        results.append((y, packed.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("error", "words", "up", "gate", "limit"),
    [
        (TypeError, "swiglu: gate is int64", None, X.long(), None),
        (TypeError, "swiglu: up is float64", X.double(), X, None),
        (ValueError, r"side by side.*float32 \(2, 7\)", None, X[:, :7], None),
        (ValueError, r"gate must be .*float32 \(\)", None, torch.tensor(1.0), None),
        (ValueError, r"gate must be \(…, F\).*float32 \(3, 0\)", torch.ones(3, 0), torch.ones(3, 0), None),
        (ValueError, r"up must have the shape .*given float32 \(2, 4\)", X[:, :4], X, None),
        (ValueError, "up must .* on meta", X.to("meta"), X, None),
        (ValueError, "limit must be positive.*given 0", None, X, 0),
        (ValueError, "limit must be positive.*given nan", None, X, float("nan")),
    ],
)
def test_bad_arguments(error, words, up, gate, limit):
    with pytest.raises(error, match=words):
        swiglu(gate, up, limit=limit)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
def test_past_two_to_the_31_elements(device, whole_gpu):
    """The last rows come out as they do alone."""
    whole_gpu(15)
    packed = torch.randn(2**17 + 8, 16384, device=device, dtype=torch.bfloat16)
    y = swiglu(packed)
    assert torch.equal(y[-16:], swiglu(packed[-16:]))
    grad, _ = op.launch_backward(y, packed, None, None)
    alone, _ = op.launch_backward(y[-16:], packed[-16:], None, None)
    assert torch.equal(grad[-16:], alone)


@needs_gpu
@pytest.mark.parametrize("width", [4096, 8192, 11008, 14336])
def test_model_widths(width, device, assert_as_good):
    packed, dy = draw((300, width), torch.bfloat16, device)
    gate, up = packed.chunk(2, -1)
    for one, two, wanted in zip(run(packed, dy, False), torchs(gate, up, dy), exact(gate, up, dy), strict=True):
        assert_as_good(one, two, wanted)


@needs_gpu
def test_no_host_synchronisation_and_cuda_graph(device, assert_capturable):
    packed, dy = draw((64, 1024), torch.bfloat16, device)

    def step():
        leaf = packed.detach().requires_grad_()  # its node belongs to the capturing stream
        y = swiglu(leaf)
        return y.detach(), *torch.autograd.grad(y, leaf, dy)

    assert_capturable(step)
