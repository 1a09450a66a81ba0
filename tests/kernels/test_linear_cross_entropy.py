"""Linear cross entropy against the float64 formula with whole logits, and against itself in other chunks and splits."""

import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from composer_kernels._linear_loss_chunks import CHUNK_BYTES, CHUNK_BYTES_WITH_DWEIGHT, default_chunk_rows
from composer_kernels.cross_entropy import cross_entropy_reference
from composer_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = {}
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
WITHOUT_GPU = "needs a CUDA GPU"


def data(rows, features, vocab, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, features, generator=generator).to(dtype)
    weight = (torch.randn(vocab, features, generator=generator) * (2 / features**0.5)).to(dtype)
    target = torch.randint(vocab, (rows,), generator=generator)
    target[1::4] = -100
    return hidden.to(device), weight.to(device), target.to(device)


def run(function, hidden, weight, target, upstream=1.0, **options):
    """Loss and gradients by hidden and weight (from main_grad if there is one), all in float64 on the CPU."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    main_grad = options.get("main_grad")
    before = None if main_grad is None else main_grad.clone()
    loss = function(hidden, weight, target, **options)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    assert main_grad is None or weight.grad is None
    by_weight = weight.grad if main_grad is None else main_grad - before
    return [x.detach().double().cpu() for x in (loss, hidden.grad, by_weight)]


def same_in_torch(hidden, weight, target, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"):
    """What PyTorch makes of it with whole logits, all in the inputs' dtype up to the logits, then in fp32."""
    logits = F.linear(hidden, weight).float()
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap, "reduction": reduction}
    return cross_entropy_reference(logits, target, **options)


def distance(x, exact):
    return ((x - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def check(inputs, upstream=1.5, **options):
    """Errors of loss and gradients are at most twice PyTorch's, in the same dtype with logits as rounded, or 4e-6."""
    ours = run(linear_cross_entropy, *inputs, upstream, **options)
    for name in ("main_grad", "grad_scale", "chunk_rows"):
        options.pop(name, None)
    hidden, weight, target = inputs
    exact = run(linear_cross_entropy_reference, hidden.double(), weight.double(), target, upstream, **options)
    peer = run(same_in_torch, *inputs, upstream, **options)
    # 4e-6 is what fp32 makes of the exponential of a difference of 20; losses are sums of at most 20 of size 1 to 10.
    for one, other, best in zip(ours, peer, exact, strict=True):
        assert distance(one, best) <= max(2 * distance(other, best), 4e-6)


@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING, {"reduction": "sum"}, {**EVERYTHING, "reduction": "none"}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(device, dtype, options, chunk_rows):
    inputs = data(7, 24, 67, dtype, device)
    check(inputs, **options, chunk_rows=chunk_rows)
    main_grad = torch.ones(67, 24, device=device)
    promise = {} if options.get("reduction") == "none" else {"grad_scale": 1.5}
    check(inputs, **options, chunk_rows=chunk_rows, main_grad=main_grad, **promise)


def test_fresh_memory_is_written(device, poisoned):
    inputs = data(9, 16, 35, torch.float32, device)
    for chunk_rows in (None, 4):
        assert not any(x.isnan().any() for x in run(linear_cross_entropy, *inputs, chunk_rows=chunk_rows))


def test_chunks_change_nothing(device):
    inputs = data(13, 16, 50, torch.float32, device)
    whole = run(linear_cross_entropy, *inputs, **EVERYTHING)
    for chunk_rows in (3, 12, 13):
        chunked = run(linear_cross_entropy, *inputs, **EVERYTHING, chunk_rows=chunk_rows)
        assert all(distance(x, y) < 2e-6 for x, y in zip(chunked, whole, strict=True)), chunk_rows


def test_weight_gradient_is_summed_in_fp32(device):
    # 1024 and then 16 chunks of 1: in bfloat16, where 256 + 0.25 is 256, these would be lost one by one.
    hidden = torch.ones(17, 8, dtype=torch.bfloat16, device=device)
    hidden[0] = 1024
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, device=device)
    target = torch.zeros(17, dtype=torch.int64, device=device)
    gradient = run(linear_cross_entropy, hidden, weight, target, reduction="sum", chunk_rows=1)[2]
    assert torch.equal(gradient, torch.tensor([-780.0, 260, 260, 260], dtype=torch.float64)[:, None].expand(4, 8))


def test_main_grad_is_added_to(device):
    inputs = data(9, 16, 35, torch.bfloat16, device)
    alone = run(linear_cross_entropy, *[x.float() if x.is_floating_point() else x for x in inputs], chunk_rows=4)[2]
    main_grad = torch.zeros(35, 16, device=device)
    for _ in range(3):
        run(linear_cross_entropy, *inputs, main_grad=main_grad, chunk_rows=4)
    assert distance(main_grad.double().cpu(), 3 * alone) < 8e-3
    fresh = torch.zeros(35, 16, device=device)
    run(linear_cross_entropy, *inputs, main_grad=fresh, chunk_rows=4)
    rounded = fresh.bfloat16().float()
    assert not torch.equal(rounded, fresh)  # it was never rounded to the weight's type


def test_a_broken_promise_shows(device):
    inputs = data(9, 16, 35, torch.float32, device)
    for scale in (0.25, torch.tensor(0.25, device=device)):
        kept = run(linear_cross_entropy, *inputs, 0.25, main_grad=torch.zeros(35, 16, device=device), grad_scale=scale)
        free = run(linear_cross_entropy, *inputs, 0.25, grad_scale=scale)
        assert all(distance(x, y) < 1e-6 for x, y in zip(kept, free, strict=True))
        assert kept[0] == run(linear_cross_entropy, *inputs)[0]  # the loss itself is not scaled
    broken = run(linear_cross_entropy, *inputs, 0.5, main_grad=torch.zeros(35, 16, device=device), grad_scale=0.25)
    assert broken[1].isnan().all()


def test_megatrons_flags(device):
    hidden, weight, target = data(9, 16, 35, torch.float32, device)
    expected = run(linear_cross_entropy, hidden, weight, target)[2]
    for shared, reduction in ((False, "mean"), (True, "mean"), (True, "none")):
        leaf, main_grad = weight.clone().requires_grad_(), torch.zeros(35, 16, device=device)
        leaf.grad_added_to_main_grad, leaf.zero_out_wgrad = False, shared
        loss = linear_cross_entropy(hidden, leaf, target, main_grad=main_grad, reduction=reduction)
        (loss if reduction == "mean" else loss.sum() / 7).backward()
        assert leaf.grad_added_to_main_grad and leaf.grad is not None  # the hooks of its data parallelism look for one
        assert not shared or (leaf.grad == 0).all()  # and add it, where the embedding has the same weight
        assert distance(main_grad.double().cpu(), expected) < 2e-6


def test_tied_weight(device):
    _, weight, target = data(8, 16, 35, torch.float32, device)
    tokens = torch.arange(8, device=device)

    def both(function, table):
        leaf = table.detach().clone().requires_grad_()
        function(torch.tanh(F.embedding(tokens, leaf)), leaf, target).backward()
        return leaf.grad.double().cpu()

    exact = both(linear_cross_entropy_reference, weight.double())
    assert distance(both(linear_cross_entropy, weight), exact) < 4e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(device, reduction):
    hidden, weight, target = data(9, 16, 35, torch.float32, device)
    expected = run(linear_cross_entropy, hidden, weight, target, reduction=reduction)
    frozen = hidden.clone().requires_grad_()
    main_grad = torch.zeros(35, 16, device=device)
    linear_cross_entropy(frozen, weight, target, reduction=reduction, main_grad=main_grad).sum().backward()
    assert distance(frozen.grad.double().cpu(), expected[1]) < 1e-6 and (main_grad == 0).all()
    leaf = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, leaf, target, reduction=reduction).sum().backward()
    assert distance(leaf.grad.double().cpu(), expected[2]) < 1e-6
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, leaf, target, reduction=reduction, main_grad=main_grad)
    assert distance(loss.double().cpu(), expected[0]) < 1e-6 and (main_grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_no_labels(device, reduction):
    inputs = data(0, 16, 35, torch.float32, device)
    loss, by_hidden, by_weight = run(linear_cross_entropy, *inputs, reduction=reduction)
    assert loss.sum() == 0 and by_hidden.shape == (0, 16) and (by_weight == 0).all()
    main_grad = torch.ones(35, 16, device=device)
    assert (run(linear_cross_entropy, *inputs, reduction=reduction, main_grad=main_grad)[2] == 0).all()
    hidden, weight, target = data(9, 16, 35, torch.float32, device)
    hidden[:] = torch.inf
    results = run(linear_cross_entropy, hidden[:, :0].new_ones(9, 16), weight, target.fill_(-100), reduction=reduction)
    assert all((x == 0).all() for x in results)


def test_leading_dimensions_and_strides(device):
    hidden, weight, target = data(12, 16, 35, torch.float32, device)
    expected = run(linear_cross_entropy, hidden, weight, target)
    shaped = run(linear_cross_entropy, hidden.view(3, 4, 16), weight, target.view(3, 4))
    assert shaped[1].shape == (3, 4, 16) and torch.equal(shaped[1].view(12, 16), expected[1])
    padded = torch.zeros(12, 20, device=device)[:, :16]
    padded.copy_(hidden)
    columns = weight.t().contiguous().t()
    leaf, other = padded.requires_grad_(), columns.requires_grad_()
    linear_cross_entropy(leaf, other, target, chunk_rows=5).backward()
    assert distance(leaf.grad.double().cpu(), expected[1]) < 2e-6
    assert distance(other.grad.double().cpu(), expected[2]) < 2e-6
    with pytest.raises(ValueError, match=r"leading dimensions that a view can flatten: call \.contiguous"):
        linear_cross_entropy(hidden.view(3, 4, 16).transpose(0, 1), weight, target.view(3, 4).t())


def test_equal_calls_give_equal_bits(device):
    inputs = data(9, 64, 500, torch.bfloat16, device)
    first, again = (run(linear_cross_entropy, *inputs, **EVERYTHING, chunk_rows=4) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_second_backward(device):
    hidden, weight, target = data(9, 16, 35, torch.float32, device)
    leaf = hidden.requires_grad_()
    loss = linear_cross_entropy(leaf, weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: backward a second time"):
        loss.backward()
    once = leaf.grad.clone()
    leaf.grad = None
    loss = linear_cross_entropy(leaf, weight, target, reduction="none").sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert distance(leaf.grad, 2 * 7 * once) < 2e-6  # 7 labels count
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(leaf, weight, target, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_cross_entropy: its gradient cannot be differentiated"):
            gradient.sum().backward()


def test_gradcheck():
    hidden, weight, target = data(5, 3, 7, torch.float64, "cpu")
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    for reduction in ("mean", "none"):
        options = {**EVERYTHING, "reduction": reduction, "chunk_rows": 2}
        if reduction == "none":  # gradcheck's repeated backwards are refused for the others
            assert torch.autograd.gradcheck(functools.partial(linear_cross_entropy, target=target, **options), leaves)
        exact = run(linear_cross_entropy_reference, *leaves, target, **EVERYTHING, reduction=reduction)
        ours = run(linear_cross_entropy, *leaves, target, **options)
        assert all(distance(x, y) < 1e-12 for x, y in zip(ours, exact, strict=True))


@pytest.mark.parametrize(("reduction", "with_main_grad"), [("mean", True), ("none", False)])
def test_compiled_without_a_break(device, reduction, with_main_grad):
    inputs = data(9, 16, 35, torch.float32, device)
    main_grads = [torch.zeros(35, 16, device=device) if with_main_grad else None for _ in range(2)]
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    eager, other = (
        run(function, *inputs, reduction=reduction, chunk_rows=4, main_grad=main_grad)
        for function, main_grad in zip((linear_cross_entropy, compiled), main_grads, strict=True)
    )
    assert all(distance(x, y) < 1e-6 for x, y in zip(eager, other, strict=True))


def test_chunks_fit():
    for rows, features, vocab, itemsize, step in (
        (16384, 4096, 128256, 2, 1024),
        (4096, 4096, 128256, 2, 1024),
        (8192, 8192, 128256, 2, 512),
        (16384, 2048, 128256, 2, 128),
        (16384, 65536, 128256, 2, 128),
        (100, 4096, 128256, 2, 1024),
        (50000, 1024, 50304, 2, 128),
        (1, 3, 7, 4, 2**22 // 3 // 128 * 128),
    ):
        chunk = default_chunk_rows(rows, features, vocab, itemsize)
        most = CHUNK_BYTES // (vocab * itemsize) // 128 * 128
        assert 1 <= chunk <= min(rows, most)
        assert chunk % step == 0 or chunk == rows
        chunks = -(-rows // chunk)
        assert chunks == -(-rows // most)  # as few as fit
        assert rows - (chunks - 1) * chunk > chunk - step * chunks  # the last is nearly as large as the others
    assert default_chunk_rows(16384, 4096, 128256, 2) == 3072 and default_chunk_rows(4096, 4096, 128256, 2) == 2048
    assert default_chunk_rows(4096, 3072, 131072, 2, CHUNK_BYTES_WITH_DWEIGHT) == 4096  # one, which needs no sum
    assert default_chunk_rows(0, 1, 100, 2) == 1 and default_chunk_rows(1000, 2**23, 2**31, 4) == 128


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "hidden is int32"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, TypeError, r"weight is bfloat16 \(5, 4\)"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight is float32 \(5, 3\)"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, r"target is int64 \(2,\)"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "on cpu, cpu and meta"),
        ({"main_grad": torch.zeros(5, 4, dtype=torch.bfloat16)}, ValueError, "main_grad is bfloat16"),
        ({"main_grad": torch.zeros(4, 5)}, ValueError, r"main_grad is float32 \(4, 5\)"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows is 0"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ],
)
def test_mistakes_are_named(change, error, words):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "target": torch.zeros(3, dtype=torch.int64)}
    arguments |= change
    with pytest.raises(error, match=f"linear_cross_entropy: .*{words}"):
        linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("target"), **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT_GPU)
def test_no_synchronisation_and_graph_capture():
    hidden, weight, target = data(512, 128, 4099, torch.bfloat16, "cuda")
    expected = run(linear_cross_entropy, hidden, weight, target, chunk_rows=128)
    static, leaf = torch.zeros_like(hidden).requires_grad_(), weight.clone().requires_grad_()

    def step():
        loss = linear_cross_entropy(static, leaf, target, chunk_rows=128)
        return loss.detach(), *torch.autograd.grad(loss, (static, leaf))

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        static.copy_(hidden)
    graph.replay()
    assert all(distance(x.double().cpu(), y) < 1e-5 for x, y in zip(results, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT_GPU)
def test_16k_tokens_of_128k_words_in_a_gigabyte(whole_gpu):
    whole_gpu(8)
    hidden, weight, target = (
        torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_(),
        (torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_(),
        torch.randint(128256, (16384,), device="cuda"),
    )
    main_grad = torch.zeros(128256, 4096, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, target, main_grad=main_grad).backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9


def test_split_over_processes(run_alone):
    """Run this file's `main`: 4 processes on the CPU; each check is made in groups of 2 and of 4."""
    run_alone(__file__)


def check_group(rank, size, group):
    """Every process has the whole loss, the whole gradient by hidden and its rows of the gradient by weight."""
    mine = slice(rank * 132 // size, (rank + 1) * 132 // size)
    for dtype in (torch.float32, torch.bfloat16):
        for options in (PLAIN, {**EVERYTHING, "reduction": "none"}, {"reduction": "sum", "chunk_rows": 4}):
            hidden, weight, target = data(11, 24, 132, dtype, "cpu")
            whole = run(linear_cross_entropy, hidden, weight, target, 1.5, **options)
            part = run(linear_cross_entropy, hidden, weight[mine], target, 1.5, **options, group=group)
            # In bfloat16 each process rounds its share of the gradient by hidden, and so does their sum.
            tolerance = 2e-6 if dtype == torch.float32 else 8e-3
            assert distance(part[0], whole[0]) < 2e-6
            assert distance(part[1], whole[1]) < tolerance
            assert distance(part[2], whole[2][mine]) < tolerance
    hidden, weight, target = data(11, 24, 132, torch.float32, "cpu")
    main_grad = torch.zeros(132 // size, 24)
    options = {"group": group, "main_grad": main_grad, "reduce_hidden_grad": False, "chunk_rows": 4}
    part = run(linear_cross_entropy, hidden, weight[mine], target, **options)
    dist.all_reduce(part[1], group=group)
    whole = run(linear_cross_entropy, hidden, weight, target)
    assert distance(part[1], whole[1]) < 2e-6 and distance(part[2], whole[2][mine]) < 2e-6
    if size == 2:
        compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
        other = run(compiled, hidden, weight[mine], target, group=group, chunk_rows=4)
        assert all(distance(x, y) < 2e-6 for x, y in zip(other, (whole[0], whole[1], whole[2][mine]), strict=True))


def process(rank, store):
    """One of the 4 processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    if rank < 2:
        check_group(rank, 2, pair)
    check_group(rank, 4, dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(process, (f"{folder}/store",), nprocs=4, start_method="fork")
