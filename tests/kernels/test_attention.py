"""`attention` against its formula in float64, on a GPU or in Triton's interpreter, and how it chooses."""

import importlib
import itertools
import sys
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from composer_kernels import _attention_backends as backends
from composer_kernels import _attention_rules as rules
from composer_kernels import _flash, _flash_backward, _flash_op
from composer_kernels._attention_backends import choose
from composer_kernels._attention_rules import Case
from composer_kernels.attention import attention, attention_reference, choose_attention

op = importlib.import_module("composer_kernels.attention")  # the package's attribute of that name is the function
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
TILE = _flash.Launch(16, 16, 4, 1)
pytestmark = pytest.mark.filterwarnings(  # NumPy's, of infinities that are meant
    "ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)


def formula(q, k, v, causal=True, window=None, scale=None):
    """One sequence, (s, h, d), in the type of its tensors: output and log-sum-exp (h, s)."""
    queries, keys = len(q), len(k)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    position = torch.arange(queries, device=q.device)[:, None] + keys - queries
    key = torch.arange(keys, device=q.device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen &= key <= position
    if window is not None:
        seen &= key >= position - window
    some = seen.any(-1)  # softmax has no answer for the other rows
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)[:, some]
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], queries), -torch.inf, dtype=q.dtype, device=q.device)
    out[some] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    lse[:, some] = scores.logsumexp(-1)
    return out, lse


def by_formula(q, k, v, starts=None, **problem):
    """All sequences; `starts` are the first rows of packed queries and keys."""
    if starts is None:
        results = [formula(*one, **problem) for one in zip(q, k, v, strict=True)]
        return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])
    rows, cols = ([slice(a, b) for a, b in itertools.pairwise(x)] for x in starts)
    results = [formula(q[r], k[c], v[c], **problem) for r, c in zip(rows, cols, strict=True)]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results], -1)


def draw(shape, keys, heads, dim, dtype, device, seed=0):
    """Q, k and v and the gradient of the output; `shape` is (batch, queries) or (tokens,)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    q, dout = (normal(*shape, heads[0], dim) for _ in range(2))
    k, v = (normal(*shape[:-1], keys, heads[1], dim) for _ in range(2))
    return q, k, v, dout


def gradients(run, q, k, v, dout, dlse=None):
    """Output, finite part of the log-sum-exp, dq, dk, dv; with `dlse` also through the log-sum-exp."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = run(q, k, v)
    some = lse.isfinite()
    results, given = (out,), (dout,)
    if dlse is not None and some.any():
        results, given = (out, lse[some]), (dout, dlse[some])
    back = torch.autograd.grad(results, (q, k, v), given, allow_unused=True)
    back = [torch.zeros_like(x) if g is None else g for x, g in zip((q, k, v), back, strict=True)]
    return out, lse[some], *back


def compare(assert_as_good, tensors, ours, starts=None, dlse=None, tensor_core_terms=0, **problem):
    """Hold `ours`, a function of q, k and v, to the formula and to PyTorch in the same type."""
    q, k, v, dout = tensors
    got = gradients(ours, q, k, v, dout, dlse)
    theirs = gradients(lambda *x: by_formula(*x, starts, **problem), q, k, v, dout, dlse)
    wide = [x.double() for x in tensors]
    exact = gradients(lambda *x: by_formula(*x, starts, **problem), *wide, None if dlse is None else dlse.double())
    for one, two, wanted in zip(got, theirs, exact, strict=True):
        assert one.shape == two.shape
        assert_as_good(one, two, wanted, tensor_core_terms=tensor_core_terms)
    return got


@pytest.fixture
def _small_tiles(monkeypatch):
    """Tiles of 16, so that small tensors have several of each kind."""
    monkeypatch.setattr(_flash, "forward_launch", lambda *_: TILE)
    monkeypatch.setattr(_flash_backward, "dq_launch", lambda *_: TILE)
    monkeypatch.setattr(_flash_backward, "dkdv_launch", lambda *_: TILE)


def ours(**options):
    return lambda q, k, v: attention(q, k, v, return_lse=True, **{"backend": "triton", **options})


CASES = {  # (batch, queries), keys, (heads, key heads), dimension, causal, window
    "square": ((2, 37), 37, (2, 1), 16, True, None),
    "all pairs": ((1, 33), 20, (2, 2), 16, False, None),
    "chunk of queries": ((1, 19), 50, (3, 1), 16, True, None),
    "window": ((1, 50), 50, (1, 1), 16, True, 9),
    "window of a chunk": ((1, 21), 60, (2, 1), 16, True, 20),
    "window, not causal": ((1, 40), 35, (2, 1), 16, False, 17),
    "one key before": ((1, 18), 18, (1, 1), 16, True, 1),
    "more queries than keys": ((1, 40), 21, (2, 1), 16, True, None),
    "more queries, window": ((2, 40), 21, (1, 1), 16, True, 5),
    "one query": ((2, 1), 33, (4, 2), 16, True, None),
    "odd dimension": ((1, 20), 20, (2, 1), 9, True, None),
    "dimension 24": ((1, 17), 33, (2, 1), 24, True, 11),
    "no query": ((2, 0), 5, (2, 1), 16, True, None),
    "no key": ((2, 5), 0, (2, 1), 16, True, None),
    "no sequence": ((0, 5), 5, (2, 1), 16, True, None),
}


@pytest.mark.usefixtures("_small_tiles", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_as_good_as_torch(case, dtype, device, assert_as_good):
    shape, keys, heads, dim, causal, window = CASES[case]
    tensors = draw(shape, keys, heads, dim, dtype, device)
    if 0 in shape:
        out, lse = ours(causal=causal, window=window)(*tensors[:3])
        assert out.shape == tensors[0].shape
        assert lse.shape == (shape[0], heads[0], shape[1])
        return
    got = compare(assert_as_good, tensors, ours(causal=causal, window=window), causal=causal, window=window)
    assert all(x.isfinite().all() for x in got)


def packed(lengths, device):
    """First rows and their end."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


LENGTHS = {
    "equal": ([20, 1, 33], [20, 1, 33]),
    "chunks": ([5, 16, 2], [30, 16, 40]),
    "nothing": ([0, 7, 0, 18], [3, 7, 0, 0]),
}


@pytest.mark.usefixtures("_small_tiles", "poisoned")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("longest", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_sequences(lengths, longest, window, device, assert_as_good):
    rows, cols = LENGTHS[lengths]
    q_starts, k_starts = packed(rows, device), packed(cols, device)
    given = {"cu_seqlens_q": q_starts} if lengths == "equal" else {"cu_seqlens_q": q_starts, "cu_seqlens_k": k_starts}
    if longest:
        given |= {"max_seqlen_q": max(rows), "max_seqlen_k": max(cols)}
    tensors = draw((sum(rows),), sum(cols), (2, 1), 16, BF16, device)
    for backend in ("triton", "torch"):
        run = ours(window=window, backend=backend, **given)
        compare(assert_as_good, tensors, run, (q_starts.tolist(), k_starts.tolist()), window=window)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
@pytest.mark.usefixtures("_small_tiles")
def test_any_problem(device, data):
    rows = data.draw(st.lists(st.integers(0, 36), min_size=1, max_size=2))
    cols = data.draw(st.lists(st.integers(0, 36), min_size=len(rows), max_size=len(rows)))
    key_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    problem = {
        "causal": data.draw(st.booleans()),
        "window": data.draw(st.none() | st.integers(0, 40)),
        "scale": data.draw(st.none() | st.floats(0.01, 2)),
    }
    dim = data.draw(st.sampled_from([8, 16, 20]))
    q_starts, k_starts = packed(rows, device), packed(cols, device)
    tensors = draw((sum(rows),), sum(cols), (key_heads * group, key_heads), dim, FP32, device, seed=sum(rows))
    run = ours(cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, **problem)
    dlse = draw((sum(rows),), 0, (key_heads * group, 1), 1, FP32, device)[3][..., 0].T
    got = gradients(run, *tensors, dlse)
    starts = (q_starts.tolist(), k_starts.tolist())
    exact = gradients(lambda *x: by_formula(*x, starts, **problem), *(x.double() for x in (*tensors, dlse)))
    for one, wanted in zip(got, exact, strict=True):
        # Sums of up to 72 products in fp32, times a scale of at most 2; some cancel to nothing, so that no error is
        # relative to them.
        torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_queries_without_keys(backend, device):
    """They give 0, minus infinity, and gradients of 0, and take part in no key's gradient."""
    q, k, v, dout = draw((1, 12), 5, (2, 1), 16, FP32, device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, backend=backend, return_lse=True)
    assert (out[:, :7] == 0).all()
    assert (lse[..., :7] == -torch.inf).all()
    assert lse[..., 7:].isfinite().all()
    whole = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    dout[:, :7] = 0
    part = torch.autograd.grad(out, (q, k, v), dout)
    assert (whole[0][:, :7] == 0).all()
    for one, two in zip(whole, part, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_window_of_nothing_before_copies_the_values(backend, device):
    q, k, v, _ = draw((1, 18), 20, (2, 1), 16, BF16, device)
    assert torch.equal(attention(q, k, v, window=0, backend=backend), v[:, 2:].expand_as(q))


@pytest.mark.usefixtures("_small_tiles")
def test_halves_merge_by_their_log_sum_exp(device, assert_as_good):
    """As context parallelism does it: the gradient flows through the merge as well."""
    q, k, v, dout = draw((1, 20), 40, (2, 1), 16, FP32, device)

    def merged(q, k, v):
        parts = [attention(q, k[:, :20], v[:, :20], causal=False, return_lse=True, backend="triton")]
        parts.append(attention(q, k[:, 20:], v[:, 20:], return_lse=True, backend="triton"))
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        shares = [(part - lse).exp().transpose(1, 2)[..., None] for _, part in parts]
        return sum(share * out for share, (out, _) in zip(shares, parts, strict=True)), lse

    compare(assert_as_good, (q, k, v, dout), merged)


LAYOUTS = {
    "(s, b, h, d)": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a slice of heads": lambda x: torch.cat((x, x), -2)[..., : x.shape[-2], :],
    "a slice of a projection": lambda x: torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "elements apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, device):
    tensors = draw((2, 20), 33, (2, 1), 16, BF16, device)
    laid_out = [LAYOUTS[layout](x) for x in tensors]
    for one, two in zip(gradients(ours(), *tensors), gradients(ours(), *laid_out), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["triton", "torch_flash"])
def test_megatrons_layout_is_not_copied(backend, device):
    """Out and gradients lie as q, k and v do, so that the next projection takes a view."""
    q, k, v = (LAYOUTS["(s, b, h, d)"](x).requires_grad_() for x in draw((2, 20), 20, (4, 2), 16, BF16, device)[:3])
    out = attention(q, k, v, backend=backend)
    assert out.stride() == q.stride()
    assert out.transpose(0, 1).flatten(2).data_ptr() == out.data_ptr()
    if backend == "triton":
        for one, two in zip(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), (q, k, v), strict=True):
            assert one.stride() == two.stride()


@pytest.mark.usefixtures("_small_tiles")
def test_repeated_runs_give_the_same_bits_and_leave_the_inputs(device):
    tensors = draw((2, 37), 37, (4, 2), 16, BF16, device)
    kept = [x.clone() for x in tensors]
    first, second = gradients(ours(), *tensors), gradients(ours(), *tensors)
    for one, two in zip((*first, *tensors), (*second, *kept), strict=True):
        assert torch.equal(one, two)


def test_second_backward_and_differentiating_twice(device):
    q, k, v, dout = draw((1, 9), 9, (1, 1), 16, FP32, device)
    out = attention(q.requires_grad_(), k, v, backend="triton")
    (first,) = torch.autograd.grad(out, q, dout, retain_graph=True)
    (second,) = torch.autograd.grad(out, q, dout.requires_grad_(), create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="attention: its gradient cannot be differentiated"):
        second.sum().backward()


def test_gradients_of_the_formula(device):
    """In float64, where plain PyTorch computes, against finite differences, twice; dense and packed."""
    q, k, v, _ = (x.double().requires_grad_() for x in draw((1, 4), 6, (2, 1), 3, FP32, device))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, window=2, return_lse=True), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, backend="torch"), (q, k, v))
    starts = {"cu_seqlens_q": packed([1, 3], device), "cu_seqlens_k": packed([2, 4], device)}
    q, k, v = (x.detach()[0].requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **starts), (q, k, v))


@pytest.mark.parametrize("case", CASES)
def test_reference_and_cpu_kernel_follow_the_formula(case):
    shape, keys, heads, dim, causal, window = CASES[case]
    q, k, v, dout = (x.double() for x in draw(shape, keys, heads, dim, FP32, "cpu"))
    runs = {"torch": attention_reference}
    if 0 not in (*shape, keys) and shape[1] <= keys:
        runs["torch_flash"] = attention
    for name, run in runs.items():
        options = {"backend": name} if run is attention else {}
        if 0 in shape:
            assert run(q, k, v, causal=causal, window=window, **options).shape == q.shape
            continue
        qkv = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = run(*qkv, causal=causal, window=window, **options)
        wanted = gradients(lambda *x: by_formula(*x, causal=causal, window=window), q, k, v, dout)
        for one, two in zip((out, *torch.autograd.grad(out, qkv, dout)), (wanted[0], *wanted[2:]), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)  # sums of tens of numbers in float64


LAUNCHES = [_flash.Launch(32, 16, 4, 2), _flash.Launch(16, 32, 4, 3), _flash.Launch(64, 64, 8, 2)]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_launch_covers_all_pairs(launch, device):
    q, k, v, dout = draw((1, 70), 90, (2, 1), 16, FP32, device)
    problem = _flash.Problem(0, 0, True, 50, 0.25)
    out, lse = _flash.launch_forward(q, k, v, None, None, problem, launch)
    back = _flash_backward.launch_backward(dout, None, q, k, v, out, lse, None, None, problem, (launch, launch))
    wide = [x.double() for x in (q, k, v, dout)]
    exact = gradients(lambda *x: by_formula(*x, window=50, scale=0.25), *wide)
    for one, wanted in zip((out, lse.flatten(), *back), (exact[0], exact[1], *exact[2:]), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-5)  # sums of up to 90 numbers in fp32


@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
def test_launches_fit_the_shared_memory(shared, monkeypatch):
    monkeypatch.setattr(_flash, "gpu", lambda device: (8, shared))
    monkeypatch.setattr(_flash_backward, "gpu", lambda device: (8, shared))
    for choose_launch in (_flash.forward_launch, _flash_backward.dq_launch, _flash_backward.dkdv_launch):
        for dim, itemsize in ((64, 2), (128, 2), (256, 2), (64, 4), (256, 4)):
            launch = choose_launch.__wrapped__(dim, itemsize, 0)
            still, walking = launch.rows, launch.columns
            if choose_launch is _flash_backward.dkdv_launch:
                still, walking = walking, still
            tiles = 1 if choose_launch is _flash.forward_launch else 2
            assert dim * itemsize * (tiles * still + 2 * walking * launch.stages) < shared
            assert min(launch.rows, launch.columns) >= 16


def test_operators_hold_what_they_promise(device):
    q, k, v, dout = draw((1, 9), 9, (2, 1), 16, BF16, device)
    q = LAYOUTS["(s, b, h, d)"](q)
    dense = (None, None, 0, 0, True, None, 0.25)
    starts = packed([4, 5], device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_flash_op._forward_op, (q, k, v, *dense), test_utils=checks)
    out, lse = _flash_op._forward_op(q, k, v, *dense)
    torch.library.opcheck(_flash_op._backward_op, (dout, lse, q, k, v, out, lse, *dense), test_utils=checks)
    flat = [x[0] for x in (q, k, v)]
    torch.library.opcheck(_flash_op._forward_op, (*flat, starts, starts, 5, 5, False, 3, 0.25), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch", "torch_flash", None])
def test_compiled_code_gives_the_same(backend, dynamic, device):
    if backend == "torch_flash" and device == "cuda":
        pytest.skip("another kernel there, of its own test")

    def block(q, k, v, starts):
        lse = backend != "torch_flash"  # whose log-sum-exp has no gradient
        first = attention(q, k, v, window=12, backend=backend, return_lse=lse)
        first = first[0] + first[1].transpose(1, 2)[..., None].to(q.dtype) if lse else first
        if backend in ("torch_flash", None):
            return first
        flat = [x.flatten(0, 1) for x in (first, k, v)]
        return attention(*flat, cu_seqlens_q=starts, max_seqlen_q=9, backend=backend)

    torch._dynamo.reset()
    results = []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        q, k, v, dout = draw((2, 9), 9, (2, 1), 16, BF16, device)
        out = run(q.requires_grad_(), k, v, packed([9, 9], device))
        results.append((out, *torch.autograd.grad(out, q, dout.reshape(out.shape))))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


# How it chooses.

HOPPER = Case("cuda", (9, 0), BF16, 128)
ORDER = ("flash3", "flash4", "cudnn", "flash2", "torch_flash", "torch_efficient", "triton", "torch")


@pytest.fixture
def install(monkeypatch):
    """Puts modules in place of FlashAttention 2, 3 or 4, or none; nothing chosen before is remembered."""

    def install(*names, function=None):
        missing = types.ModuleType("missing")
        for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
            found = types.ModuleType(module) if module in names else None
            if found is not None:
                found.__path__ = []
                found.flash_attn_func = found.flash_attn_varlen_func = function or missing
            monkeypatch.setitem(sys.modules, module, found)
        if "flash_attn.cute" in names and "flash_attn" not in names:  # FlashAttention 4 alone leaves it empty
            monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
            sys.modules["flash_attn"].__path__ = []
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
        for cache in (rules.load, backends.choose, backends._lse_option):
            cache.cache_clear()
        op._choices.clear()

    yield install
    for cache in (rules.load, backends.choose, backends._lse_option):
        cache.cache_clear()
    op._choices.clear()


ALL = ("flash_attn", "flash_attn.cute", "flash_attn_interface")


def changed(case=HOPPER, **values):
    return Case(**{**{name: getattr(case, name) for name in Case.__dataclass_fields__}, **values})


def test_takes_the_best_that_is_installed(install):
    install(*ALL)
    assert (choose(HOPPER, None).name, *choose(HOPPER, None).alternatives) == ORDER
    install("flash_attn.cute")
    choice = choose(HOPPER, None)
    assert choice.name == "flash4"
    why = dict(choice.rejected)
    assert "not installed" in why["flash3"]
    assert "flash_attn_func" in why["flash2"]
    assert "arXiv 2407.08608" in choice.reason
    install()
    assert choose(HOPPER, None).name == "cudnn"
    assert choose(changed(capability=(10, 0)), None).name == "cudnn"
    assert choose(changed(capability=(8, 0)), None).name == "torch_flash"
    assert choose(changed(capability=(12, 0)), None).name == "cudnn"


@pytest.mark.parametrize(
    ("values", "name", "reasons"),
    [
        ({"fewer": True}, "flash3", {"cudnn": "top left", "torch_efficient": "top left"}),
        ({"more": True}, "triton", {"flash3": "see nothing", "cudnn": "see nothing", "torch_flash": "see nothing"}),
        ({"more": True, "causal": False}, "flash3", {}),
        ({"packed": True}, "flash3", {"cudnn": "packed", "torch_efficient": "packed"}),
        ({"windowed": True}, "flash3", {"cudnn": "window", "torch_efficient": "window"}),
        ({"empty": True}, "triton", {"flash3": "empty", "flash4": "empty", "flash2": "empty", "cudnn": "empty"}),
        ({"lse": True}, "flash4", {"flash3": "no gradient", "flash2": "no gradient", "torch_flash": "no gradient"}),
        ({"lse": True, "grad": False}, "flash3", {}),
        ({"dtype": FP32}, "torch_efficient", {"flash3": "not float32", "cudnn": "not float32"}),
        ({"dtype": FP32, "grouped": True}, "triton", {"torch_efficient": "as many heads"}),
        ({"dtype": torch.float64}, "torch", {"triton": "not float64"}),
        ({"dim": 20}, "triton", {"flash3": "multiples of 8", "torch_efficient": "whole 16 bytes"}),
        ({"dim": 512}, "torch_efficient", {"flash4": "up to 256", "triton": "up to 256"}),
        ({"aligned": False}, "triton", {"flash2": "16 bytes", "torch_efficient": "16 bytes"}),
        ({"single_key": True}, "flash3", {"cudnn": "single key"}),
        ({"deterministic": True}, "flash3", {"cudnn": "not deterministic"}),
        ({"compiling": True}, "cudnn", {"flash3": "look into", "flash4": "look into", "flash2": "look into"}),
        ({"allowed": (False, False, False)}, "flash3", {"cudnn": "switched off", "torch_flash": "switched off"}),
        ({"capability": (10, 0)}, "flash4", {"flash3": "is for compute capability 9"}),
        ({"capability": (10, 0), "dim": 192}, "flash2", {"flash4": "up to 128, or 256", "cudnn": "up to 128"}),
        ({"capability": (8, 9)}, "flash2", {"flash4": "9 to 11"}),
        ({"capability": (7, 5)}, "torch_efficient", {"triton": "needs compute capability 8.0"}),
    ],
)
def test_refuses_what_does_not_fit(values, name, reasons, install):
    install(*ALL)
    choice = choose(changed(**values), None)
    assert choice.name == name
    rejected = dict(choice.rejected)
    assert not {choice.name, *choice.alternatives} & set(rejected)
    assert {choice.name, *choice.alternatives} | set(rejected) == set(rules.RULES)
    for other, words in reasons.items():
        assert words in rejected[other]


def test_a_package_that_fails_on_import_is_named(install, monkeypatch):
    install()

    def fail(name):
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert "undefined symbol" in dict(choose(HOPPER, None).rejected)["flash3"]


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None), (False, 3)])
@pytest.mark.parametrize("module", ALL)
def test_packages_are_called_rightly(module, causal, window, is_packed, lse, install):
    """Stand-ins with the packages' signatures compute what their arguments mean to the packages."""
    older = module == "flash_attn_interface" and not is_packed  # always returned the log-sum-exp

    def compute(q, k, v, softmax_scale, causal, window_size, deterministic, starts=None):
        left, right = (None if bound == -1 else bound for bound in window_size)
        assert deterministic
        assert right == (0 if causal else None)
        return by_formula(q, k, v, starts, causal=causal, window=left, scale=softmax_scale)

    def dense(q, k, v, *, return_attn_probs=False, return_lse=False, **options):
        out, log = compute(q, k, v, **options)
        return (out, log, None) if older or return_attn_probs or return_lse else out

    def dense_old(q, k, v, *, softmax_scale, causal, window_size, deterministic):
        return compute(q, k, v, softmax_scale, causal, window_size, deterministic)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, return_attn_probs=False, **options):
        assert (max_seqlen_q, max_seqlen_k) == (4, 6)
        out, log = compute(q, k, v, starts=(cu_seqlens_q.tolist(), cu_seqlens_k.tolist()), **options)
        return (out, log.masked_fill(log.isinf(), torch.inf)) if return_attn_probs else out

    install(module, function=varlen if is_packed else dense_old if older else dense)
    name = {"flash_attn": "flash2", "flash_attn_interface": "flash3", "flash_attn.cute": "flash4"}[module]
    q, k, v, _ = draw((7,) if is_packed else (2, 4), 9 if is_packed else 6, (2, 1), 8, FP32, "cpu")
    packing, starts = None, None
    if is_packed:
        packing = backends.Packing(packed([4, 3, 0], "cpu"), packed([6, 0, 3], "cpu"), 4, 6)
        starts = packing.q_starts.tolist(), packing.k_starts.tolist()
    called = backends.Settings(causal, window, 0.3, lse, True)
    out, log = backends.RUNS[name](q, k, v, packing, called)
    wanted = by_formula(q, k, v, starts, causal=causal, window=window, scale=0.3)
    torch.testing.assert_close(out, wanted[0], rtol=0, atol=0)
    if lse:
        torch.testing.assert_close(log, wanted[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cudnn", "torch_flash", "torch_efficient"])
@pytest.mark.parametrize("layout", ["(b, s, h, d)", "(s, b, h, d)"])
def test_pytorchs_kernels_are_called_rightly(name, layout):
    """On tensors that say they are on a GPU and hold nothing: operators, shapes, strides, that gradients flow."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        sizes = {"cudnn": (4, 2), "torch_flash": (4, 2), "torch_efficient": (4, 4)}[name]
        q, k = (torch.empty(3, 33, heads, 16, device="cuda", dtype=BF16, requires_grad=True) for heads in sizes)
        if layout == "(s, b, h, d)":
            q, k = (torch.empty(33, 3, h, 16, device="cuda", dtype=BF16, requires_grad=True) for h in sizes)
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        out, lse = backends.RUNS[name](q, k, k, None, backends.Settings(True, None, 0.25, True, False))
        assert out.shape == q.shape
        assert out.stride() == q.stride() or name == "torch_efficient"
        assert out.requires_grad
        assert lse.shape == (3, 4, 33)
        if name == "torch_flash":
            starts = torch.empty(5, dtype=torch.int32, device="cuda")
            flat = [x.flatten(0, 1) for x in (q, k, k)]
            settings = backends.Settings(True, 5, 0.25, True, False)
            out, lse = backends.RUNS[name](*flat, backends.Packing(starts, starts, 33, 33), settings)
            assert (out.shape, lse.shape) == ((99, 4, 16), (4, 99))


def test_choice_follows_the_call(install, device):
    """What the dispatcher reads off the tensors, and that it remembers nothing that has changed."""
    install()
    q, k, v, _ = draw((1, 6), 6, (2, 1), 16, FP32, "cpu")

    def refusal(name, *tensors, **options):
        return dict(choose_attention(*tensors, **options).rejected).get(name)

    with_grad = q.clone().requires_grad_()
    assert refusal("torch_flash", q, k, v) is None
    assert "see nothing" in refusal("torch_flash", q, k[:, :3], v[:, :3])
    assert refusal("torch_flash", q, k[:, :3], v[:, :3], causal=False) is None
    assert "no gradient" in refusal("torch_flash", with_grad, k, v, return_lse=True)
    with torch.no_grad():
        assert refusal("torch_flash", with_grad, k, v, return_lse=True) is None
    assert "empty" in refusal("torch_flash", q[:, :0], k, v)
    flat = [x[0] for x in (q, k, v)]
    assert "packed" in refusal("torch_flash", *flat, cu_seqlens_q=packed([2, 4], "cpu"))
    assert choose_attention(q, k, v, backend="torch").name == "torch"
    assert choose_attention(q, k, v, backend="torch").reason == "asked for by backend='torch'"
    facts = op._facts(q, k, v, True, None, None, False, False)
    assert facts[:5] == ("cpu", None, FP32, 16, True)
    assert op._facts(q, k[:, :1], v[:, :1], True, 3, None, True, True)[5:] == (
        *(False, True, False, True, False, True, True, True, False, True, True, False),
    )
    half = torch.zeros(1, 6, 2, 24, dtype=BF16)
    assert op._aligned(half[..., :16], False)
    assert not op._aligned(half[..., 4:20], False)
    assert not op._aligned(half[..., :20].contiguous(), False)
    assert op._aligned(half[..., 4:20], True)


def test_interpreter_and_cpu_have_their_own_order(monkeypatch):
    case = changed(device="cpu", capability=(0, 0))
    choose.cache_clear()
    monkeypatch.setattr(backends, "INTERPRETING", False)
    monkeypatch.setattr(rules, "INTERPRETING", False)
    assert choose(case, None).name == "torch_flash"
    assert choose(changed(case, packed=True), None).name == "torch"
    assert dict(choose(case, None).rejected)["triton"] == "runs on CUDA tensors, these are on cpu"
    choose.cache_clear()
    monkeypatch.setattr(backends, "INTERPRETING", True)
    monkeypatch.setattr(rules, "INTERPRETING", True)
    assert choose(case, None).name == "triton"
    choose.cache_clear()


X = torch.ones(1, 4, 2, 8)
STARTS = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "tensors", "options"),
    [
        (TypeError, "attention: q is int64", (X.long(), X, X), {}),
        (TypeError, "must have one type.*bfloat16", (X.bfloat16(), X, X), {}),
        (ValueError, r"q must be \(b, s, h, d\).*given float32 \(4, 2, 8\)", (X[0], X[0], X[0]), {}),
        (ValueError, r"q must be \(t, h, d\), as cu_seqlens_q", (X, X, X), {"cu_seqlens_q": STARTS}),
        (ValueError, "v must be .* h and d at least 1", (X, X, X[..., :0]), {}),
        (ValueError, "k and v must have one shape", (X, X, X[:, :3]), {}),
        (ValueError, "k and v must have .* device of q, cpu", (X, X.to("meta"), X.to("meta")), {}),
        (ValueError, "k must have the batch and head dimension", (X, X[..., :4], X[..., :4]), {}),
        (ValueError, "number of heads that divides", (X[:, :, :1], X, X), {}),
        (ValueError, "k must have the batch", (X.expand(2, 4, 2, 8), X, X), {}),
        (ValueError, "window must be at least 0.*given -1", (X, X, X), {"window": -1}),
        (ValueError, "scale must be positive.*given 0", (X, X, X), {"scale": 0.0}),
        (ValueError, "scale must be positive.*given nan", (X, X, X), {"scale": float("nan")}),
        (ValueError, "packed sequences need cu_seqlens_q", (X, X, X), {"cu_seqlens_k": STARTS}),
        (ValueError, "cu_seqlens_q must be int32.*given int64", (X[0],) * 3, {"cu_seqlens_q": STARTS.long()}),
        (
            ValueError,
            "cu_seqlens_k must be .* as long",
            (X[0],) * 3,
            {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS[:1]},
        ),
        (ValueError, "backend must be one of flash4, .*given 'flash5'", (X, X, X), {"backend": "flash5"}),
        (ValueError, "'cudnn' cannot do this call: runs on CUDA .*these can: .*torch", (X, X, X), {"backend": "cudnn"}),
    ],
)
def test_bad_arguments(error, words, tensors, options):
    for function in (attention, choose_attention):
        with pytest.raises(error, match=words):
            function(*tensors, **options)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def without(backend, q, k, v, **options):
    """Why a call cannot be done by this backend, or None."""
    try:
        choose_attention(*(x.detach().requires_grad_() for x in (q, k, v)), backend=backend, **options)
    except ValueError as error:
        return str(error)
    return None


def runs(backend, **options):
    """Output with a gradient, and the log-sum-exp, which has none in most implementations."""

    def run(q, k, v):
        out = attention(q, k, v, backend=backend, **options)
        with torch.no_grad():
            return out, attention(q, k, v, backend=backend, return_lse=True, **options)[1]

    return run


@needs_gpu
@pytest.mark.parametrize("backend", rules.RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("causal_window", [(True, None), (False, None), (True, 200)])
def test_every_implementation_on_a_gpu(causal_window, dim, dtype, backend, device, assert_as_good):
    """At sizes of real tiles, with fewer queries than keys and with as many, as far as it can do these."""
    causal, window = causal_window
    refusals = []
    for queries, heads in ((700, (4, 4)), (300, (4, 2))):
        tensors = draw((2, queries), 700, heads, dim, dtype, device)
        refusals.append(without(backend, *tensors[:3], causal=causal, window=window))
        if refusals[-1] is None:
            run = runs(backend, causal=causal, window=window)
            # PyTorch's memory-efficient kernel makes fp32 products of three TF32 ones, on tensor cores
            terms = 3 * 700 if (backend, dtype) == ("torch_efficient", FP32) else 0
            compare(assert_as_good, tensors, run, tensor_core_terms=terms, causal=causal, window=window)
    if None not in refusals:
        pytest.skip(refusals[0])


@needs_gpu
@pytest.mark.parametrize("backend", rules.RULES)
def test_packed_on_a_gpu(backend, device, assert_as_good):
    rows, cols = [300, 1, 700, 0, 40], [500, 1, 700, 3, 400]
    q_starts, k_starts = packed(rows, device), packed(cols, device)
    tensors = draw((sum(rows),), sum(cols), (4, 2), 128, BF16, device)
    given = {"cu_seqlens_q": q_starts, "cu_seqlens_k": k_starts, "max_seqlen_q": 700, "max_seqlen_k": 700}
    if refusal := without(backend, *tensors[:3], **given):
        pytest.skip(refusal)
    compare(assert_as_good, tensors, runs(backend, **given), (q_starts.tolist(), k_starts.tolist()))


@needs_gpu
@pytest.mark.parametrize("backend", rules.RULES)
def test_gradient_through_the_log_sum_exp_on_a_gpu(backend, device, assert_as_good):
    """Where a call asks for the log-sum-exp and gradients, a backend gives both or is refused."""
    *tensors, dout = draw((2, 300), 700, (4, 2), 128, BF16, device)
    dlse = draw((2, 300), 0, (4, 1), 1, FP32, device)[3][..., 0].transpose(1, 2)
    if refusal := without(backend, *tensors, return_lse=True):
        pytest.skip(refusal)
    compare(assert_as_good, (*tensors, dout), ours(backend=backend), dlse=dlse)


@needs_gpu
def test_our_rules_are_no_laxer_than_pytorchs(device):
    verdicts = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "torch_flash": torch.backends.cuda.can_use_flash_attention,
        "torch_efficient": torch.backends.cuda.can_use_efficient_attention,
    }
    for dtype in DTYPES:
        for dim in (8, 20, 64, 96, 128, 192, 256):
            for heads in ((4, 4), (4, 2)):
                q, k, v, _ = (x.requires_grad_() for x in draw((1, 64), 64, heads, dim, dtype, device))
                choice = choose_attention(q, k, v)
                turned = [x.transpose(1, 2) for x in (q, k, v)]
                params = torch.backends.cuda.SDPAParams(*turned, None, 0.0, True, heads[0] != heads[1])
                for name, usable in verdicts.items():
                    assert name not in (choice.name, *choice.alternatives) or usable(params)


@needs_gpu
def test_past_two_to_the_31_elements(device, whole_gpu):
    """The last sequence comes out as it does alone."""
    whole_gpu(45)  # q, k, v, the output and all gradients
    q, k, v, dout = draw((1, 512), 512, (8, 8), 128, BF16, device)
    many = 2**31 // q.numel() + 2
    big = [x.expand(many, *x.shape[1:]).contiguous() for x in (q, k, v, dout)]
    for one, alone in zip(gradients(ours(), *big), gradients(ours(), q, k, v, dout), strict=True):
        assert torch.equal(one.flatten()[-alone.numel() :], alone.flatten())


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", None])
def test_no_host_synchronisation_and_cuda_graph(backend, device, assert_capturable):
    q, k, v, dout = draw((2, 512), 512, (4, 2), 64, BF16, device)

    def step():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    assert_capturable(step, tolerance=0 if backend == "triton" else 1e-2)  # others do not all add up in one order
