"""`decode_attention` against attention written out in float64, on a GPU or in Triton's interpreter."""

import dataclasses
import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_kernels._decode import Launch, Rotation, default_launch, launch_decode
from composer_kernels.decode_attention import decode_attention, decode_attention_reference

op = importlib.import_module("composer_kernels.decode_attention")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DECIDED = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call's sizes and options."""

    lengths: tuple[int, ...] = (5, 0, 37)
    capacity: int = 40
    kv_heads: int = 2
    group: int = 3
    dim: int = 16
    page: int = 0
    append: bool = True
    rotary: int = 16
    interleaved: bool = False
    window: int | None = None


def draw(case, dtype, device, seed=0):
    """The arguments of a call; what lies past a request's length in the caches is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    batch = len(case.lengths)
    pages = -(-case.capacity // case.page) if case.page else 0
    rows, slots = (pages * batch + 1, case.page) if case.page else (batch, case.capacity)
    table = None
    if case.page:
        table = torch.randperm(pages * batch, generator=generator).view(batch, pages) + 1
    caches = []
    for _ in range(2):
        cache = torch.full((rows, slots, case.kv_heads, case.dim), math.nan)
        for request, length in enumerate(case.lengths):
            for token in range(length):
                row, slot = (int(table[request, token // slots]), token % slots) if case.page else (request, token)
                cache[row, slot] = normal(case.kv_heads, case.dim)
        caches.append(cache.to(device, dtype))
    arguments = {
        "q": 2 * normal(batch, case.kv_heads * case.group, case.dim),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "lengths": torch.tensor(case.lengths, dtype=torch.int32),
        "page_table": None if table is None else table.int(),
        "interleaved": case.interleaved,
        "window": case.window,
    }
    if case.append:
        arguments |= {"new_k": normal(batch, case.kv_heads, case.dim), "new_v": normal(batch, case.kv_heads, case.dim)}
    if case.rotary:
        frequency = 100.0 ** -(torch.arange(case.rotary // 2) / (case.rotary // 2))
        angles = torch.arange(case.capacity + 1)[:, None] * frequency
        arguments |= {"cos": angles.cos().to(device), "sin": angles.sin().to(device)}
    for name in ("q", "new_k", "new_v"):
        if name in arguments:
            arguments[name] = arguments[name].to(device, dtype)
    for name in ("lengths", "page_table"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].to(device)
    return arguments


def rotated(vector, position, arguments):
    """One head, turned by complex multiplication."""
    if "cos" not in arguments:
        return vector
    turn = torch.complex(arguments["cos"][position].double().cpu(), arguments["sin"][position].double().cpu())
    width = 2 * len(turn)
    part = vector[:width]
    pairs = part.view(-1, 2) if arguments["interleaved"] else torch.stack(part.chunk(2), -1)
    done = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    done = done.flatten() if arguments["interleaved"] else torch.cat((done[:, 0], done[:, 1]))
    return torch.cat((done, vector[width:]))


def exact(arguments, rounding=torch.float64):
    """One request, one head, one token at a time, in float64; rotated vectors are rounded to `rounding` first."""
    q, keys, values = (arguments[name].double().cpu() for name in ("q", "k_cache", "v_cache"))
    batch, heads, dim = q.shape
    group = heads // keys.shape[2]
    table = arguments["page_table"]
    out = torch.zeros_like(q)
    for request in range(batch):
        length = int(arguments["lengths"][request])

        def at(cache, token, head, request=request):
            if table is None:
                return cache[request, token, head]
            return cache[int(table[request, token // cache.shape[1]]), token % cache.shape[1], head]

        for head in range(heads):
            kv = head // group
            tokens = [(at(keys, t, kv), at(values, t, kv)) for t in range(length)]
            if "new_k" in arguments:
                new = rotated(arguments["new_k"][request, kv].double().cpu(), length, arguments)
                tokens.append((new.to(rounding).double(), arguments["new_v"][request, kv].double().cpu()))
            if arguments["window"]:
                tokens = tokens[-arguments["window"] :]
            if tokens:
                place = length if "new_k" in arguments else length - 1
                query = rotated(q[request, head], place, arguments).to(rounding).double()
                k, v = (torch.stack(part) for part in zip(*tokens, strict=True))
                out[request, head] = (k @ query / dim**0.5).softmax(0) @ v
    return out


def call(arguments, function=decode_attention):
    """Result, and the caches after the call."""
    arguments = arguments | {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    with torch.no_grad():
        out = function(**arguments)
    return out, arguments["k_cache"], arguments["v_cache"]


CASES = {
    "plain": Case(append=False, rotary=0),
    "rotated without a new token": Case(append=False, lengths=(5, 1, 37)),
    "append": Case(rotary=0),
    "append and rotate": Case(),
    "interleaved, partial": Case(rotary=8, interleaved=True),
    "paged": Case(page=8),
    "odd pages": Case(page=5, capacity=38),
    "window": Case(window=7),
    "window of one": Case(window=1),
    "window, paged, no append": Case(window=16, page=16, append=False, rotary=0),
    "one head each, odd width": Case(kv_heads=3, group=1, dim=20, rotary=20),
    "more than 16 rows": Case(kv_heads=1, group=18, dim=8, rotary=4),
    "full": Case(lengths=(40, 39), capacity=40, append=False, rotary=0),
    "no request": Case(lengths=()),
}


@pytest.fixture(params=["kernel", "formula"])
def _both_ways(request, monkeypatch):
    """The Triton kernels, and the formula that CPUs get."""
    if request.param == "formula":
        monkeypatch.setattr(op, "runs_kernel", lambda x: False)


@pytest.mark.usefixtures("_both_ways", "poisoned")
@pytest.mark.parametrize("name", CASES)
def test_attention_written_out(name, device):
    """In fp32, where sums in another order differ by a few units in the last place."""
    arguments = draw(CASES[name], torch.float32, device)
    out, *_ = call(arguments)
    torch.testing.assert_close(out.double().cpu(), exact(arguments), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_good_as_torch(dtype, device, assert_as_good):
    case = Case(lengths=(33, 60), capacity=64, dim=32, rotary=0, append=False)
    arguments = draw(case, dtype, device)
    out, *_ = call(arguments)
    for request, length in enumerate(case.lengths):
        q = arguments["q"][request][:, None]
        k, v = (arguments[name][request, :length].transpose(0, 1) for name in ("k_cache", "v_cache"))
        torchs = torch.nn.functional.scaled_dot_product_attention(
            q[None], k.repeat_interleave(3, 0)[None], v.repeat_interleave(3, 0)[None]
        )[0, :, 0]
        assert_as_good(out[request].cpu(), torchs.cpu(), exact(arguments)[request])


@settings(max_examples=10, **DECIDED)
@given(data=st.data())
def test_any_case(device, data):
    capacity = data.draw(st.integers(1, 50))
    case = Case(
        lengths=tuple(data.draw(st.lists(st.integers(0, capacity - 1), min_size=1, max_size=3))),
        capacity=capacity,
        kv_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 4)),
        dim=2 * data.draw(st.integers(1, 12)),
        page=data.draw(st.sampled_from([0, 1, 3, 16])),
        append=data.draw(st.booleans()),
        rotary=data.draw(st.sampled_from([0, 2])),
        interleaved=data.draw(st.booleans()),
        window=data.draw(st.none() | st.integers(1, 60)),
    )
    arguments = draw(case, torch.float32, device, seed=data.draw(st.integers(0, 9)))
    out, *_ = call(arguments)
    torch.testing.assert_close(out.double().cpu(), exact(arguments), rtol=2e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:divide by zero")  # log2(0) of empty splits, in the interpreter's NumPy
@pytest.mark.parametrize("launch", [Launch(1, 16), Launch(2, 16), Launch(5, 16), Launch(35, 16), Launch(3, 64)])
@pytest.mark.parametrize("page", [0, 8])
def test_every_launch_gives_the_same(launch, page, device):
    arguments = draw(Case(page=page), torch.float32, device)
    rotation = Rotation(arguments["cos"], arguments["sin"], False)
    new = (arguments["new_k"], arguments["new_v"])
    tensors = [arguments[name] for name in ("q", "k_cache", "v_cache", "lengths")]
    wanted = exact(arguments)
    out = launch_decode(*tensors, new, arguments["page_table"], rotation, None, 16**-0.5, launch)
    torch.testing.assert_close(out.double().cpu(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("page", [0, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_gains_the_new_token_and_nothing_else(dtype, page, device):
    case = Case(page=page, lengths=(5, 0, 37))
    arguments = draw(case, dtype, device)
    _, keys, values = call(arguments)
    expected = [arguments["k_cache"].clone(), arguments["v_cache"].clone()]
    for request, length in enumerate(case.lengths):
        row, slot = request, length
        if page:
            row, slot = int(arguments["page_table"][request, length // page]), length % page
        for head in range(case.kv_heads):
            expected[0][row, slot, head] = rotated(
                arguments["new_k"][request, head].double().cpu(), length, arguments
            ).to(dtype)
        expected[1][row, slot] = arguments["new_v"][request]
    # Rotation in fp32 and in float64 may round to neighbours.
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(keys, expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(values.isnan(), expected[1].isnan())
    assert torch.equal(values.nan_to_num(), expected[1].nan_to_num())


@pytest.mark.usefixtures("_both_ways")
def test_token_by_token_equals_full_attention(device):
    """Twelve steps from an empty cache give the rows of causal attention over rotated queries and keys."""
    case = Case(lengths=(0, 0), capacity=12)
    steps = [draw(case, torch.float32, device, seed=step) for step in range(12)]
    first = steps[0]
    outs = []
    for place, step in enumerate(steps):
        arguments = step | {"k_cache": first["k_cache"], "v_cache": first["v_cache"]}
        arguments["lengths"] = torch.full_like(first["lengths"], place)
        outs.append(decode_attention(**arguments))

    def turned(name, head):
        return torch.stack([rotated(step[name][0, head].double().cpu(), t, step) for t, step in enumerate(steps)])

    for head in range(6):
        scores = turned("q", head) @ turned("new_k", head // 3).T / 4
        causal = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf).softmax(-1)
        values = torch.stack([step["new_v"][0, head // 3].double().cpu() for step in steps])
        ours = torch.stack([out[0, head].double().cpu() for out in outs])
        torch.testing.assert_close(ours, causal @ values, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("page", [0, 8])
def test_a_token_that_does_not_fit_is_used_and_not_kept(page, device):
    case = Case(lengths=(40, 3), page=page)
    arguments = draw(case, torch.float32, device)
    out, keys, _ = call(arguments)
    torch.testing.assert_close(out.double().cpu(), exact(arguments), rtol=2e-5, atol=2e-6)
    changed = (keys != arguments["k_cache"]) & ~(keys.isnan() & arguments["k_cache"].isnan())
    assert changed.flatten(2).any(2).sum() == 1  # the other request's


def test_strides_of_a_fused_projection(device):
    """Query, key and value as views of one tensor, and a cache whose heads come before its tokens."""
    arguments = draw(Case(), torch.float32, device)
    wanted, *_ = call(arguments)
    joined = torch.cat([arguments[name].flatten(1) for name in ("q", "new_k", "new_v")], 1)
    for name, part in zip(("q", "new_k", "new_v"), joined.split([96, 32, 32], 1), strict=True):
        arguments[name] = part.unflatten(1, (-1, 16))
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        assert torch.equal(decode_attention(**arguments), wanted)


def test_repeated_runs_are_bit_equal(device):
    arguments = draw(Case(page=8), torch.bfloat16, device)
    for one, two in zip(call(arguments), call(arguments), strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())


def test_compiled_code_calls_the_operator(device):
    arguments = draw(Case(), torch.float32, device)
    compiled = torch.compile(decode_attention, backend="aot_eager", fullgraph=True)
    for one, two in zip(call(arguments), call(arguments, compiled), strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
    inputs = [arguments[name] for name in ("q", "k_cache", "v_cache", "lengths", "new_k", "new_v", "page_table")]
    inputs = [x.nan_to_num() if x is not None else None for x in inputs]
    torch.library.opcheck(
        torch.ops.composer_kernels.decode_attention.default,
        (*inputs, arguments["cos"], arguments["sin"], False, None, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_reference_is_the_formula(device):
    arguments = draw(Case(page=5, window=9), torch.float64, device)
    for one, two in zip(call(arguments), call(arguments, decode_attention_reference), strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)
    torch.testing.assert_close(call(arguments)[0].cpu(), exact(arguments))


@pytest.mark.parametrize("processors", [3, 108, 132])
@pytest.mark.parametrize("tokens", [1, 100, 4096, 131072])
@pytest.mark.parametrize("pairs", [1, 8, 64, 1024])
def test_default_launch(pairs, tokens, processors):
    launch = default_launch(pairs, tokens, 128, 2, processors)
    assert launch.splits == 1 or tokens / launch.splits >= 2 * launch.block - 1  # no split without work of its own
    if tokens == 131072 and pairs <= 8:
        assert pairs * launch.splits > processors  # the whole GPU reads
    if pairs == 1024:
        assert launch.splits == 1 or tokens / launch.splits > 4096  # parts, of 4 tokens' bytes each, must not cost


BAD = {
    "q": (lambda a: a | {"q": a["q"][0]}, ValueError, r"q must be \(B, H, D\)"),
    "dtype": (lambda a: a | {"q": a["q"].long()}, TypeError, "q is int64"),
    "heads": (lambda a: a | {"q": a["q"][:, :5]}, ValueError, "a divisor of 5"),
    "batch": (lambda a: a | {"k_cache": a["k_cache"][:2]}, ValueError, r"k_cache must be \(3, capacity, G, 16\)"),
    "v_cache": (lambda a: a | {"v_cache": a["v_cache"][:, :7]}, ValueError, r"v_cache must be \(3, 40, 2, 16\)"),
    "cache dtype": (lambda a: a | {"k_cache": a["k_cache"].half()}, ValueError, "k_cache must be .* in the type"),
    "one of two": (lambda a: a | {"new_v": None}, ValueError, "new_k and new_v go together"),
    "new_k": (lambda a: a | {"new_k": a["new_k"][:, :1]}, ValueError, r"new_k must be \(3, 2, 16\)"),
    "lengths": (lambda a: a | {"lengths": a["lengths"].float()}, ValueError, r"lengths must be \(3,\), int32"),
    "table": (lambda a: a | {"page_table": a["lengths"]}, ValueError, "page_table must be"),
    "sin": (lambda a: a | {"sin": None}, ValueError, "cos and sin go together"),
    "wide angles": (
        lambda a: a | {"cos": torch.ones(9, 9), "sin": torch.ones(9, 9)},
        ValueError,
        "with R at most 16",
    ),
    "window": (lambda a: a | {"window": 0}, ValueError, "window must be at least 1"),
    "gradient": (lambda a: a | {"q": a["q"].clone().requires_grad_()}, RuntimeError, "has no gradient"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name):
    change, error, words = BAD[name]
    with pytest.raises(error, match=f"decode_attention: .*{words}"):
        decode_attention(**change(draw(Case(), torch.float32, "cpu")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_host_synchronisation_and_cuda_graph(device, assert_capturable):
    arguments = draw(Case(lengths=(500, 3, 900), capacity=1024, dim=64, rotary=64), torch.bfloat16, device)
    assert_capturable(lambda: [x.nan_to_num() for x in call(arguments)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_more_than_31_bits_of_elements(whole_gpu):
    """The last request of a cache of 2^31 elements and some."""
    whole_gpu(12)
    q = torch.randn(129, 8, 128, device="cuda", dtype=torch.bfloat16)
    caches = [torch.zeros(129, 16384, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    caches[0][-1].normal_()
    caches[1][-1].normal_()
    lengths = torch.full((129,), 16384, device="cuda", dtype=torch.int32)
    last = decode_attention_reference(q[-1:], caches[0][-1:], caches[1][-1:], lengths[-1:])
    torch.testing.assert_close(decode_attention(q, *caches, lengths)[-1:], last, rtol=2e-2, atol=2e-3)
