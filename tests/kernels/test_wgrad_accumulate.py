"""`wgrad_accumulate` against a float64 product, and in Megatron-core's own linear layer."""

import importlib
import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

op = importlib.import_module("composer_kernels.wgrad_accumulate")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = [(BF16, FP32), (FP16, FP32), (FP32, FP32), (BF16, BF16), (FP16, FP16)]
"""Of the operands, and of the accumulator."""
NAMES = {FP32: op.wgrad_gemm_accum_fp32, BF16: op.wgrad_gemm_accum_fp16, FP16: op.wgrad_gemm_accum_fp16}


def draw(lead, outputs, inputs, dtype, grad_dtype, device, seed=0):
    """X (…, K), dY (…, N) and G (N, K)."""
    generator = torch.Generator().manual_seed(seed)
    x, dy, main_grad = (
        torch.randn(*s, generator=generator) for s in ((*lead, inputs), (*lead, outputs), (outputs, inputs))
    )
    return x.to(device, dtype), dy.to(device, dtype), main_grad.to(device, grad_dtype)


def exact(x, dy, main_grad):
    """G + Σ over rows of dyᵀ x, in float64."""
    return main_grad.double() + torch.einsum("...n,...k->nk", dy.double(), x.double())


@pytest.mark.parametrize("lead", [(7,), (5, 3), (2, 3, 4), (300, 1)])
@pytest.mark.parametrize(("dtype", "grad_dtype"), TYPES)
def test_as_good_as_torch(lead, dtype, grad_dtype, device, assert_as_good):
    x, dy, main_grad = draw(lead, 24, 40, dtype, grad_dtype, device)
    true, theirs = exact(x, dy, main_grad), op.wgrad_accumulate_reference(x, dy, main_grad)
    for call in (op.wgrad_accumulate, NAMES[grad_dtype]):
        ours = main_grad.clone()
        assert call(x, dy, ours) is None
        assert_as_good(ours, theirs, true)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    rows=st.integers(0, 9),
    outputs=st.integers(0, 17),
    inputs=st.integers(0, 17),
    types_=st.sampled_from(TYPES),
    steps=st.integers(1, 3),
)
def test_any_shape_step_after_step(rows, outputs, inputs, types_, steps, device, assert_as_good):
    ours = theirs = draw((), outputs, inputs, *types_, device)[2]
    true, ours = ours.double(), ours.clone()
    for step in range(steps):
        x, dy, _ = draw((rows,), outputs, inputs, *types_, device, seed=step)
        op.wgrad_accumulate(x, dy, ours)
        theirs, true = op.wgrad_accumulate_reference(x, dy, theirs), exact(x, dy, true)
    assert_as_good(ours, theirs, true)


def test_sums_that_16_bits_lose(device):
    """A gradient of 1 + 2^-12 rounds to 1 in bfloat16; a thousand of 2^-12 are lost in a 16-bit accumulator."""
    x, dy = torch.ones(2, 1, device=device, dtype=BF16), torch.tensor([[1.0], [2**-12]], device=device, dtype=BF16)
    main_grad = torch.zeros(1, 1, device=device)
    op.wgrad_accumulate(x, dy, main_grad)
    for _ in range(1000):
        op.wgrad_accumulate(x[1:], dy[1:], main_grad)
    assert main_grad.item() == 1 + 1001 * 2**-12


@pytest.mark.parametrize(("dtype", "grad_dtype"), TYPES)
def test_without_rows_the_accumulator_stays(dtype, grad_dtype, device):
    x, dy, main_grad = draw((3, 0), 4, 5, dtype, grad_dtype, device)
    main_grad[0, 0], main_grad[1, 1] = torch.nan, torch.inf
    kept = main_grad.clone()
    op.wgrad_accumulate(x, dy, main_grad)
    assert torch.equal(main_grad.isnan(), kept.isnan())
    assert torch.equal(main_grad.nan_to_num(), kept.nan_to_num())


LAYOUTS = {
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "elements apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "columns": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "one row again and again": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "grad_dtype"), TYPES)
def test_any_layout(layout, dtype, grad_dtype, device, assert_as_good):
    x, dy, main_grad = draw((4, 3), 8, 6, dtype, grad_dtype, device)
    x, dy = (LAYOUTS[layout](t) for t in (x, dy))
    true, theirs = exact(x, dy, main_grad), op.wgrad_accumulate_reference(x, dy, main_grad)
    op.wgrad_accumulate(x, dy, main_grad)
    assert_as_good(main_grad, theirs, true)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("dtype", "grad_dtype"), TYPES)
def test_writes_the_accumulator_and_nothing_beside_it(dtype, grad_dtype, turned, device, assert_as_good):
    """A part of a larger buffer, as Megatron's gradient buffers are, by rows or by columns."""
    x, dy, main_grad = draw((9,), 8, 6, dtype, grad_dtype, device)
    buffer = torch.full((12, 12), 7.0, dtype=grad_dtype, device=device)
    place = buffer.t()[2:10, 3:9] if turned else buffer[2:10, 3:9]
    place.copy_(main_grad)
    op.wgrad_accumulate(x, dy, place)
    assert_as_good(place, op.wgrad_accumulate_reference(x, dy, main_grad), exact(x, dy, main_grad))
    place.fill_(7.0)
    assert (buffer == 7).all()


def test_autograd_stays_out(device):
    x, dy, main_grad = (t.requires_grad_() for t in draw((4,), 3, 5, BF16, FP32, device))
    wanted = exact(x.detach(), dy.detach(), main_grad.detach())
    op.wgrad_accumulate(x, dy, main_grad)
    assert main_grad.is_leaf
    torch.testing.assert_close(main_grad.detach().double(), wanted, rtol=1e-5, atol=1e-6)  # sums in fp32


def test_the_same_bits_again(device):
    x, dy, main_grad = draw((129, 2), 33, 65, BF16, FP32, device)
    results = [main_grad.clone() for _ in range(3)]
    for result in results:
        op.wgrad_accumulate(x, dy, result)
        assert torch.equal(result, results[0])


def test_compiled_code_and_operator(device):
    x, dy, main_grad = draw((4, 2), 3, 5, BF16, FP32, device)
    torch.library.opcheck(op._op, (x, dy, main_grad), test_utils=("test_schema", "test_faketensor"))

    def accumulate(x, dy, main_grad):
        op.wgrad_gemm_accum_fp32(x * 2, dy, main_grad)
        return main_grad * 2

    eager, compiled = main_grad.clone(), main_grad.clone()
    one = accumulate(x, dy, eager)
    two = torch.compile(accumulate, backend="aot_eager", fullgraph=True)(x, dy, compiled)
    assert torch.equal(one, two)
    assert torch.equal(eager, compiled)


X, DY, G = torch.ones(2, 3, 5), torch.ones(2, 3, 4), torch.ones(4, 5)


@pytest.mark.parametrize(
    ("error", "words", "call", "arguments"),
    [
        (TypeError, "input is int64", op.wgrad_accumulate, (X.long(), DY, G)),
        (TypeError, "grad_output is float16.* type of input, float32", op.wgrad_accumulate, (X, DY.half(), G)),
        (TypeError, "main_grad is float16.* type of input, bfloat16, and", op.wgrad_accumulate,
         (X.bfloat16(), DY.bfloat16(), G.half())),
        (TypeError, "main_grad is float32", op.wgrad_accumulate, (X.double(), DY.double(), G)),
        (TypeError, "main_grad is float64", op.wgrad_accumulate, (X, DY, G.double())),
        (TypeError, "accum_fp32: main_grad is bfloat16.*accepted is float32", op.wgrad_gemm_accum_fp32,
         (X.bfloat16(), DY.bfloat16(), G.bfloat16())),
        (TypeError, "accum_fp16: main_grad is float32.*accepted are float16 and", op.wgrad_gemm_accum_fp16, (X, DY, G)),
        (ValueError, r"input is float32 \(2, 3, 5\) on cpu and grad_output is float32 \(6, 4\)", op.wgrad_accumulate,
         (X, DY.view(6, 4), G)),
        (ValueError, r"input is float32 \(\)", op.wgrad_accumulate, (X.sum(), DY, G)),
        (ValueError, r"main_grad is float32 \(5, 4\) on cpu; accepted is \(4, 5\)", op.wgrad_accumulate, (X, DY, G.T)),
        (ValueError, "on cpu, cpu and meta", op.wgrad_accumulate, (X, DY, G.to("meta"))),
    ],
)  # fmt: skip
def test_bad_arguments(error, words, call, arguments):
    with pytest.raises(error, match=words):
        call(*arguments)


@pytest.fixture
def no_apex(monkeypatch, tmp_path):
    """Ours is not there yet, and Apex's cannot be imported (built for another PyTorch, say); the file it would be."""
    monkeypatch.setitem(sys.modules, op.MEGATRON_MODULE, None)
    del sys.modules[op.MEGATRON_MODULE]  # so that what was there comes back, and what comes goes
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / f"{op.MEGATRON_MODULE}.py"
    file.write_text("raise ImportError('undefined symbol')\n")
    return file


@pytest.mark.usefixtures("no_apex")
def test_our_module_can_be_imported():
    module = op.install_wgrad_module()
    assert importlib.import_module(op.MEGATRON_MODULE) is module
    assert op.install_wgrad_module() is module
    assert importlib.util.find_spec(op.MEGATRON_MODULE) is module.__spec__
    assert module.wgrad_gemm_accum_fp32 is op.wgrad_gemm_accum_fp32
    assert module.wgrad_gemm_accum_fp16 is op.wgrad_gemm_accum_fp16


def test_apexs_module_is_left_alone(no_apex, monkeypatch):
    no_apex.write_text("whose = 'Apex'\n")
    assert op.install_wgrad_module().whose == "Apex"
    imported = types.ModuleType(op.MEGATRON_MODULE)
    monkeypatch.setitem(sys.modules, op.MEGATRON_MODULE, imported)
    assert op.install_wgrad_module() is imported


PROGRAM = """
import types, torch
from composer_kernels.wgrad_accumulate import install_wgrad_module
install_wgrad_module()
from megatron.core.tensor_parallel import layers
assert layers._grad_accum_fusion_available
group = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
for kind, grad_kind in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)):
    weight = torch.nn.Parameter(torch.randn(6, 4).to(kind))
    weight.main_grad = torch.ones(6, 4, dtype=grad_kind)
    x, dy = torch.randn(5, 2, 4).to(kind), torch.randn(5, 2, 6).to(kind)
    y = layers.linear_with_grad_accumulation_and_async_allreduce(x, weight, None, True, False, False, tp_group=group)
    y.backward(dy)
    wanted = 1 + torch.einsum("sbn,sbk->nk", dy.double(), x.double())
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad.double(), wanted, rtol=1e-2 if grad_kind == kind else 1e-5, atol=1e-2)
"""


def test_megatrons_linear_layer_adds_to_main_grad():
    """In a process of its own, since Megatron remembers whether the module was there."""
    pytest.importorskip("megatron.core")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize(("dtype", "grad_dtype"), TYPES)
def test_model_shapes(dtype, grad_dtype, device, assert_as_good):
    x, dy, main_grad = draw((1024, 2), 2048, 1024, dtype, grad_dtype, device)
    true, theirs = exact(x, dy, main_grad), op.wgrad_accumulate_reference(x, dy, main_grad)
    op.wgrad_accumulate(x, dy, main_grad)
    # 16-bit operands are multiplied on tensor cores; the reference's, made fp32, are not
    assert_as_good(main_grad, theirs, true, tensor_core_terms=0 if dtype == FP32 else 2048)


@needs_gpu
def test_no_host_synchronisation_no_allocation_and_cuda_graph(device):
    x, dy, main_grad = draw((256, 2), 512, 384, BF16, FP32, device)
    wanted = main_grad.clone()
    for _ in range(2):
        op.wgrad_accumulate(x, dy, wanted)
    ours = main_grad.clone()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.wgrad_accumulate(x, dy, ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.wgrad_accumulate(x, dy, ours)
    graph.replay()
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)  # cuBLAS may sum in another order on other streams
