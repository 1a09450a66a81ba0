"""`rope` and its kin against complex rotation in float64 and against Megatron-core's own unfused code."""

import functools
import itertools
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_kernels import _launch, _rope, _rope_op
from composer_kernels.rope import (
    apply_fused_qkv_rotary_pos_emb,
    fused_apply_rotary_pos_emb,
    fused_apply_rotary_pos_emb_thd,
    rope,
    rope_,
    rope_qk,
    rope_qkv,
    rope_qkv_,
    rope_qkv_reference,
    rope_reference,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def angles_of(positions, half, device="cpu"):
    """(positions, half) in float64, from one turn and more a token down to little."""
    return torch.outer(torch.arange(positions).double(), 2.0 ** torch.linspace(1, -4, half).double()).to(device)


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def places(length, offset=0, cu_seqlens=None, restart=True, cp_rank=0, cp_size=1):
    """The position of each token on this process, None outside all sequences, cutting whole sequences into chunks."""
    bounds = [0, length * cp_size] if cu_seqlens is None else list(cu_seqlens)
    found = [None] * (bounds[0] // cp_size)
    for start, end in itertools.pairwise(bounds):
        whole = [offset + (0 if restart else start) + place for place in range(end - start)]
        if cp_size > 1:
            chunk = len(whole) // (2 * cp_size)
            other = 2 * cp_size - 1 - cp_rank
            whole = whole[cp_rank * chunk :][:chunk] + whole[other * chunk :][:chunk]
        found += whole
    return (found + [None] * length)[:length]


def exact(t, angles, positions, interleaved=False, sign=1):
    """T (s, …, n, D) as complex numbers in float64, times e^{i angle}."""
    half = angles.shape[1]
    turned = t.detach().double().clone()
    for index, position in enumerate(positions):
        if position is None:
            continue
        token = turned[index, ..., : 2 * half]
        real, imaginary = (token[..., ::2], token[..., 1::2]) if interleaved else (token[..., :half], token[..., half:])
        factor = torch.polar(torch.ones_like(angles[position]), sign * angles[position])
        product = torch.complex(real, imaginary) * factor
        real.copy_(product.real), imaginary.copy_(product.imag)
    return turned


def in_torch(t, angles, positions, interleaved=False):
    """The usual formula in the type of t; token by token where positions are missing."""
    half = angles.shape[1]
    kept = [position is None for position in positions]
    chosen = angles[[position or 0 for position in positions]].view(len(positions), *[1] * (t.dim() - 2), half)
    cos, sin = chosen.cos().to(t.dtype), chosen.sin().to(t.dtype)
    x, rest = t[..., : 2 * half], t[..., 2 * half :]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    keep = torch.tensor(kept, dtype=torch.bool, device=t.device).view(-1, *[1] * (t.dim() - 1))
    return torch.where(keep, t, torch.cat((turned, rest), -1))


def heads_of(qkv, heads, groups, dim):
    """Query, key and value of packed qkv, by copying head after head."""
    rows = qkv.unflatten(-1, (-1, dim))
    per = heads // groups
    index = range(rows.shape[2])
    q, k, v = ([i for i in index if want(i % (per + 2))] for want in (lambda j: j < per, per.__eq__, (per + 1).__eq__))
    return rows[:, :, q], rows[:, :, k], rows[:, :, v]


@pytest.fixture(params=["kernel", "formula"])
def _both_ways(request, monkeypatch):
    """The Triton kernel, and the formula that CPUs get."""
    if request.param == "formula":
        monkeypatch.setattr(_rope_op, "runs_kernel", lambda x: False)


@pytest.mark.usefixtures("_both_ways", "poisoned")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_tensor_as_good_as_torch(dtype, interleaved, device, assert_as_good):
    t, dy = (draw(7, 2, 5, 24, dtype=dtype, device=device, seed=seed).requires_grad_() for seed in (0, 1))
    angles = angles_of(7, 8, device)
    y = rope(t, angles.cos().float(), angles.sin().float(), interleaved=interleaved)
    (dt,) = torch.autograd.grad(y, t, dy)
    theirs = in_torch(t, angles, range(7), interleaved)
    assert y.dtype == dt.dtype == dtype
    assert_as_good(y, theirs, exact(t, angles, range(7), interleaved))
    assert_as_good(dt, torch.autograd.grad(theirs, t, dy)[0], exact(dy, angles, range(7), interleaved, -1))


@pytest.mark.usefixtures("_both_ways", "poisoned")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_as_good_as_torch(dtype, interleaved, device, assert_as_good):
    heads, groups, dim = 6, 2, 16
    qkv = draw(5, 2, (heads + 2 * groups) * dim, dtype=dtype, device=device).requires_grad_()
    angles = angles_of(5, 6, device)
    tables = angles.cos().float(), angles.sin().float()
    ours = rope_qkv(qkv, *tables, num_heads=heads, num_query_groups=groups, head_dim=dim, interleaved=interleaved)
    upstream = [draw(*y.shape, dtype=dtype, device=device, seed=seed) for seed, y in enumerate(ours)]
    (dqkv,) = torch.autograd.grad(ours, qkv, upstream)
    q, k, v = heads_of(qkv, heads, groups, dim)
    theirs = *(in_torch(x, angles, range(5), interleaved) for x in (q, k)), v
    (their_dqkv,) = torch.autograd.grad(theirs, qkv, upstream)
    true = *(exact(x, angles, range(5), interleaved) for x in (q, k)), v.double()
    true_d = *(exact(x, angles, range(5), interleaved, -1) for x in upstream[:2]), upstream[2].double()
    for one, two, wanted in zip(ours, theirs, true, strict=True):
        assert one.dtype == dtype
        assert_as_good(one, two, wanted)
    for one, two, wanted in zip(
        heads_of(dqkv, heads, groups, dim), heads_of(their_dqkv, heads, groups, dim), true_d, strict=True
    ):
        assert_as_good(one, two, wanted)


@st.composite
def cases(draw):
    """Shapes, and the options that say where tokens stand."""
    cp_size = draw(st.sampled_from([1, 1, 2, 3]))
    unit = 2 * cp_size if cp_size > 1 else 1
    case = types.SimpleNamespace(
        batch=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        per_group=draw(st.integers(1, 4)),
        half=draw(st.integers(1, 9)),
        rest=draw(st.integers(0, 5)),
        dtype=draw(st.sampled_from(DTYPES)),
        interleaved=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        offset=draw(st.integers(0, 5)),
        cp_size=cp_size,
        cp_rank=draw(st.integers(0, cp_size - 1)),
        restart=True,
        cu_seqlens=None,
        length=draw(st.integers(0, 5)) * unit // cp_size,
    )
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
        first = draw(st.sampled_from([0, 0, 1])) * unit
        bounds = [first + unit * sum(lengths[:index]) for index in range(len(lengths) + 1)]
        case.cu_seqlens = bounds
        case.restart = draw(st.booleans())
        case.length = bounds[-1] // cp_size + (draw(st.integers(0, 2)) if case.restart else 0)
    case.positions = places(case.length, case.offset, case.cu_seqlens, case.restart, case.cp_rank, cp_size)
    return case


def options_of(case, device):
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, device=device)
    return {
        "interleaved": case.interleaved,
        "position_offset": case.offset,
        "cu_seqlens": cu_seqlens if cu_seqlens is None or case.seed % 2 else cu_seqlens.int(),
        "restart_positions": case.restart,
        "cp_rank": case.cp_rank,
        "cp_size": case.cp_size,
    }


@pytest.mark.usefixtures("_both_ways")
@MANY
@given(case=cases(), in_place=st.booleans(), packed=st.booleans())
def test_every_combination(case, in_place, packed, device, assert_as_good):
    """Results and gradients, one tensor or packed, in place or not, wherever the tokens stand."""
    dim, heads = 2 * case.half + case.rest, case.groups * case.per_group
    angles = angles_of(case.offset + max(case.length, 1) * case.cp_size + 1, case.half, device)
    tables, options = (angles.cos().float(), angles.sin().float()), options_of(case, device)
    if packed:
        shape = (case.length, case.batch, case.groups * (case.per_group + 2) * dim)
        options |= {"num_heads": heads, "num_query_groups": case.groups, "head_dim": dim}
        call = rope_qkv_ if in_place else rope_qkv
    else:
        shape, call = (case.length, case.batch, heads, dim), rope_ if in_place else rope
    leaf, dy = (draw(*shape, dtype=case.dtype, device=device, seed=case.seed + i) for i in range(2))
    x = leaf.requires_grad_().clone()
    kept = x.detach().clone()
    y = call(x, *tables, **options)
    assert torch.equal(x, y if in_place else kept)

    turn = functools.partial(exact, angles=angles, positions=case.positions, interleaved=case.interleaved)
    usual = functools.partial(in_torch, angles=angles, positions=case.positions, interleaved=case.interleaved)
    if not packed:
        (gradient,) = torch.autograd.grad(y, leaf, dy)
        assert_as_good(y, usual(kept), turn(kept))
        assert_as_good(gradient, usual(dy), turn(dy, sign=-1))
        return
    split = functools.partial(heads_of, heads=heads, groups=case.groups, dim=dim)
    ours = split(y) if in_place else y
    (gradient,) = torch.autograd.grad(ours, leaf, split(dy))
    for results, given_, sign in ((ours, kept, 1), (split(gradient), dy, -1)):
        for part, (one, two) in enumerate(zip(results, split(given_), strict=True)):
            if part == 2:
                assert torch.equal(one, two)
            else:
                assert_as_good(one, usual(two), turn(two, sign=sign))


class Group:
    """As much of a process group as Megatron's rotation asks for."""

    def __init__(self, rank, size):
        self.rank, self.size = (lambda: rank), (lambda: size)


@pytest.fixture(scope="module")
def megatron():
    """Megatron-core's `rope_utils`, its fused functions ours."""
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused_apply_rotary_pos_emb)
        patch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", fused_apply_rotary_pos_emb_thd)
        yield rope_utils


def config_of(interleaved, fused):
    return types.SimpleNamespace(
        apply_rope_fusion=fused, rotary_interleaved=interleaved, mrope_section=None, multi_latent_attention=False
    )


def freqs_of(angles, interleaved):
    """Angles as Megatron hands them over, (positions, 1, 1, 2 · half)."""
    both = torch.stack((angles, angles), -1).flatten(1) if interleaved else torch.cat((angles, angles), -1)
    return both.float()[:, None, None]


@MANY
@given(case=cases(), whole=st.booleans())
def test_like_megatron(case, whole, device, megatron):
    """Megatron's own function with `apply_rope_fusion`, which then calls ours, as without; gradients too."""
    dim = 2 * case.half + case.rest
    shape = (case.length, case.batch, case.per_group, dim)
    rows, packed = case.length, {}
    if case.cu_seqlens is not None:
        bounds = [bound - case.cu_seqlens[0] for bound in case.cu_seqlens]  # Megatron knows no tokens outside
        shape = (bounds[-1] // case.cp_size, case.per_group, dim)
        rows = bounds[-1] if whole else max(bounds[-1], 1) + 3
        packed["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    freqs = freqs_of(angles_of(rows, case.half, device), case.interleaved)
    t, dy = (draw(*shape, device=device, seed=case.seed + i) for i in range(2))
    results = []
    for fused in (True, False):
        leaf = t.clone().requires_grad_()
        group = Group(case.cp_rank, case.cp_size)
        y = megatron.apply_rotary_pos_emb(leaf, freqs, config_of(case.interleaved, fused), cp_group=group, **packed)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)  # cosines and sums rounded in fp32


@pytest.mark.parametrize("interleaved", [False, True])
def test_like_megatron_on_packed_heads(interleaved, device, megatron):
    """What `attention.py` does with `mixed_qkv` (s, b, groups, …) and its split sizes."""
    groups, per, dim = 2, 3, 8
    qkv = draw(5, 2, groups, (per + 2) * dim, device=device).requires_grad_()
    freqs = freqs_of(angles_of(5, 3, device), interleaved)
    sizes = [per * dim, dim, dim]
    ours = apply_fused_qkv_rotary_pos_emb(qkv, freqs, freqs, sizes, interleaved=interleaved)
    q, k, v = qkv.split(sizes, -1)
    turn = functools.partial(
        megatron.apply_rotary_pos_emb, freqs=freqs, config=config_of(interleaved, False), cp_group=Group(0, 1)
    )
    theirs = turn(q.reshape(5, 2, -1, dim)), turn(k), v
    upstream = [draw(*y.shape, device=device, seed=seed) for seed, y in enumerate(ours)]
    gradients = [torch.autograd.grad(results, qkv, upstream) for results in (ours, theirs)]
    for one, two in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6)  # cosines and sums rounded in fp32


def test_far_angles(device):
    """The kernel's own cosines hold at positions of a million."""
    t, angles = draw(4, 1, 1, 16, device=device), (1e6 + 1e5 * torch.rand(4, 8, device=device)).float()
    y = fused_apply_rotary_pos_emb(t, freqs_of(angles, False))
    true = exact(t, angles.double(), range(4))
    torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-6)  # a few roundings in fp32


LAYOUTS = {
    "rows apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "elements apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "heads first": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, device):
    """Of a tensor, packed heads, tables and gradients; tables' sines strided otherwise than cosines."""
    lay_out = LAYOUTS[layout]
    angles = angles_of(4, 8, device)
    plain, packed = (draw(*shape, dtype=torch.bfloat16, device=device) for shape in ((4, 3, 5, 16), (4, 3, 8 * 16)))
    upstream = [draw(4, 3, n, 16, dtype=torch.bfloat16, device=device, seed=n) for n in (4, 2, 2)]
    results = []
    for arrange in (lambda x: x, lay_out):
        tables = arrange(angles.cos().float()) if "first" not in layout else angles.cos().float(), angles.sin().float()
        t, qkv = (arrange(x).detach().requires_grad_() for x in (plain, packed))
        y = rope(t, *tables)
        (dt,) = torch.autograd.grad(y, t, arrange(plain))
        parts = rope_qkv(qkv, *tables, num_heads=4, num_query_groups=2, head_dim=16)
        (dqkv,) = torch.autograd.grad(parts, qkv, [arrange(x) for x in upstream])
        results.append((y, dt, *parts, dqkv))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert two.is_contiguous()


def test_a_gradient_that_is_one_number_everywhere(device):
    qkv = draw(3, 2, 64, device=device).requires_grad_()
    angles = angles_of(3, 4, device)
    parts = rope_qkv(qkv, angles.cos().float(), angles.sin().float(), num_heads=4, num_query_groups=2, head_dim=8)
    (dqkv,) = torch.autograd.grad(sum(part.sum() for part in parts), qkv)
    for part, one in zip(heads_of(dqkv, 4, 2, 8), parts, strict=True):
        wanted = torch.ones_like(one) if one is parts[2] else exact(torch.ones_like(one), angles, range(3), sign=-1)
        torch.testing.assert_close(part.double(), wanted.double(), rtol=1e-6, atol=1e-6)  # roundings in fp32


@pytest.mark.parametrize("launch", [_rope.Launch(1, 4, 4), _rope.Launch(8, 1, 4), _rope.Launch(4, 16, 8)])
def test_every_launch_covers_all_elements(launch, device):
    plan = _rope.Plan(6, 3, 8, False, 0, 0, 1, True)
    angles = angles_of(5, 3, device)
    tables = _rope.Tables(angles.cos().float(), angles.sin().float(), None)
    qkv = draw(5, 2, 12 * 8, device=device)
    q, k, v = _rope.launch_split(qkv, tables, plan, True, launch)
    for one, part in zip((q, k), heads_of(qkv, 6, 3, 8), strict=False):
        torch.testing.assert_close(one.double(), exact(part, angles, range(5)), rtol=1e-5, atol=1e-6)  # fp32 roundings
    assert torch.equal(v, heads_of(qkv, 6, 3, 8)[2])
    back = _rope.launch_join(q, k, v, tables, plan.back(), launch)
    torch.testing.assert_close(back, qkv, rtol=1e-5, atol=1e-6)  # fp32 roundings


@pytest.mark.parametrize(
    ("heads", "groups"),
    [(32, 8), (32, 0), (8, 0), (40, 8), (28, 4), (14, 2), (16, 1), (12, 12), (24, 8), (7, 7), (1, 0)],
)
@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("half", [32, 64])
def test_default_launch_wastes_at_most_an_eighth(heads, groups, with_v, half):
    launch = _rope.default_launch(heads, groups, with_v, half)
    parts = (heads, groups, groups * with_v)
    padded = sum(-(-n // launch.heads) * launch.heads for n in parts)
    assert padded <= 9 / 8 * sum(parts)
    assert launch.tokens * launch.heads * half == 512 * launch.warps


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("bounds", [[1, 4], [1, 3, 4], [1, 2, 3, 4]])
def test_tokens_outside_all_sequences_pass_through(bounds, device):
    """Bit by bit, whatever they hold."""
    t = draw(6, 2, 8, device=device)
    t[0, 0, 0], t[4, 1, 5], t[5, 0, 2] = torch.inf, torch.nan, -torch.inf
    cos = sin = torch.ones(8, 4, device=device)
    y = rope(t, cos, sin, cu_seqlens=torch.tensor(bounds, device=device))
    outside = [0, 4, 5]
    assert torch.equal(y[outside].view(torch.int32), t[outside].view(torch.int32))
    assert not torch.equal(y[1:4], t[1:4])


def test_value_passes_through(device):
    qkv = draw(2, 1, 32, device=device)
    qkv[..., -8:] = torch.inf
    tables = torch.zeros(2, 4, device=device), torch.ones(2, 4, device=device)
    _, _, v = rope_qkv(qkv, *tables, num_heads=2, num_query_groups=1, head_dim=8, copy_value=True)
    assert (v == torch.inf).all()


@pytest.mark.usefixtures("_both_ways")
def test_packed_sequences_longer_than_the_tables_show(device):
    """Without a look at the lengths, which would make the host wait."""
    t, bounds = draw(5, 2, 8, device=device), torch.tensor([0, 5], device=device)
    cos, sin, freqs = (make(3, 4, device=device) for make in (torch.ones, torch.zeros, torch.zeros))
    for y in (
        rope(t, cos, sin, cu_seqlens=bounds),
        fused_apply_rotary_pos_emb_thd(t, bounds, freqs_of(freqs, False)),
    ):
        assert torch.equal(y[:3], t[:3])
        assert y[3:].isnan().all()


def test_value_is_copied_where_a_gradient_is_wanted(device):
    qkv = draw(2, 1, 32, device=device)
    tables = torch.ones(2, 4, device=device), torch.zeros(2, 4, device=device)
    call = functools.partial(rope_qkv, num_heads=2, num_query_groups=1, head_dim=8)

    def shares(v):
        return v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()

    assert shares(call(qkv, *tables)[2])
    assert not shares(call(qkv, *tables, copy_value=True)[2])
    qkv.requires_grad_()
    assert not shares(call(qkv, *tables)[2])
    q, k, v = call(qkv, *tables, copy_value=False)
    assert shares(v)
    (dqkv,) = torch.autograd.grad((q * k).sum() + (v * v).sum(), qkv)
    assert torch.equal(dqkv[..., -8:], 2 * qkv[..., -8:])
    with torch.no_grad():
        assert shares(call(qkv, *tables)[2])


def test_in_place_is_in_place_and_known_to_autograd(device):
    tables = torch.zeros(2, 4, device=device), torch.ones(2, 4, device=device)
    heads = {"num_heads": 2, "num_query_groups": 1, "head_dim": 8}
    for call, shape in ((rope_, (2, 1, 2, 8)), (functools.partial(rope_qkv_, **heads), (2, 1, 1, 32))):
        for wants_gradient in (False, True):
            x = draw(*shape, device=device).requires_grad_(wants_gradient) * 1
            squares, version = x.square(), x._version
            assert call(x, *tables) is x
            assert x._version > version
            if wants_gradient:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    squares.sum().backward()


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("heads", "groups", "batch"), [(8, 2, 2), (3, 3, 1), (2, 5, None)])
@pytest.mark.parametrize("options", [{}, {"interleaved": True, "position_offset": 2}, {"cp_size": 2, "cp_rank": 1}])
def test_query_and_key_at_once_as_one_by_one(dtype, heads, groups, batch, options, device):
    """To the bit, also their gradients and those of one of them, wherever heads lie."""
    angles = angles_of(16, 3, device).to(torch.promote_types(dtype, torch.float32))
    tokens = (6,) if batch is None else (6, batch)
    for apart in (False, True):
        whole = draw(*tokens, heads + groups, 8, dtype=dtype, device=device).requires_grad_()
        parts = whole.split((heads, groups), -2)
        q, k = parts if apart else [part.contiguous() for part in parts]
        both = rope_qk(q, k, angles.cos(), angles.sin(), **options)
        alone = [rope(x, angles.cos(), angles.sin(), **options) for x in (q, k)]
        upstream = [draw(*y.shape, dtype=dtype, device=device, seed=seed) for seed, y in enumerate(alone)]
        for some in (slice(0, 2), slice(0, 1), slice(1, 2)):
            gradients = [
                torch.autograd.grad(ys[some], whole, upstream[some], retain_graph=True)[0] for ys in (both, alone)
            ]
            assert torch.equal(*gradients)
        for one, other in zip(both, alone, strict=True):
            assert one.is_contiguous()
            assert torch.equal(one, other)


def test_second_backward_gives_the_same_and_leaves_everything(device):
    qkv, tables = draw(3, 2, 64, device=device), [f(angles_of(3, 4, device)).float() for f in (torch.cos, torch.sin)]
    kept = [x.clone() for x in (qkv, *tables)]
    parts = rope_qkv(qkv.requires_grad_(), *tables, num_heads=4, num_query_groups=2, head_dim=8)
    upstream = [draw(*part.shape, device=device, seed=5) for part in parts]
    (first,) = torch.autograd.grad(parts, qkv, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(parts, qkv, upstream)
    for one, two in zip((first, qkv, *tables), (second, *kept), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("options", [{}, {"interleaved": True, "cp_size": 2, "cp_rank": 1}])
def test_gradients_of_the_formula(options, device):
    """In float64 against finite differences, and those of the gradients; the references also by the tables."""
    angles = angles_of(8, 2, device)
    tables = angles.cos(), angles.sin()
    t, qkv = (draw(*shape, dtype=torch.float64, device=device).requires_grad_() for shape in ((4, 1, 2, 5), (4, 20)))
    heads = {"num_heads": 2, "num_query_groups": 1, "head_dim": 5}

    def in_place(x):
        return rope_qkv_(x * 1, *tables, **heads, **options)

    for function, x in (
        (lambda x: rope(x, *tables, **options), t),
        (lambda x: rope_qkv(x, *tables, **heads, **options), qkv),
        (in_place, qkv),
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
    leaves = [table.requires_grad_() for table in tables]
    assert torch.autograd.gradcheck(lambda *x: rope_reference(*x, **options), (t, *leaves))
    assert torch.autograd.gradcheck(lambda *x: rope_qkv_reference(*x, **heads, **options), (qkv, *leaves))


def test_gradient_of_the_gradient_turns_forth(device):
    qkv = draw(3, 2, 64, device=device).requires_grad_()
    tables = [f(angles_of(3, 4, device)).float() for f in (torch.cos, torch.sin)]
    parts = rope_qkv(qkv, *tables, num_heads=4, num_query_groups=2, head_dim=8)
    upstream = [torch.zeros_like(part).requires_grad_() for part in parts]
    (dqkv,) = torch.autograd.grad(parts, qkv, upstream, create_graph=True)
    for one, part in zip(torch.autograd.grad(dqkv, upstream, qkv.detach()), parts, strict=True):
        assert torch.equal(one, part)


def test_operators_hold_what_they_promise(device):
    angles, checks = angles_of(3, 4, device).float(), ("test_schema", "test_faketensor")
    heads, plan = (4, 2, 8), [False, 0, 0, 1, True, 1]
    tables = angles.cos(), angles.sin(), torch.tensor([0, 2, 3], device=device)
    t, qkv = draw(3, 2, 4, 8, device=device), draw(3, 2, 64, device=device)
    parts = [part.contiguous() for part in heads_of(qkv, *heads)]
    as_numbers = [int(value) for value in plan]
    for tables_ in (tables, (angles, None, None)):
        torch.library.opcheck(_rope_op._turn_op, (t, *tables_, [4, 0, 8, *as_numbers]), test_utils=checks)
        torch.library.opcheck(_rope_op._pair_op, (*parts[:2], *tables_, [4, 0, 8, *as_numbers]), test_utils=checks)
        torch.library.opcheck(_rope_op._turn_op, (qkv, *tables_, [*heads, *as_numbers]), test_utils=checks)
        torch.library.opcheck(_rope_op._join_op, (*parts, *tables_, [*heads, *as_numbers]), test_utils=checks)
        for copy in (False, True):
            torch.library.opcheck(_rope_op._split_op, (qkv, *tables_, [*heads, *as_numbers], copy), test_utils=checks)


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_compiled_code_gives_the_same_bits(wants_gradient, device):
    angles = angles_of(4, 4, device)
    tables, heads = (angles.cos().float(), angles.sin().float()), {"num_heads": 4, "num_query_groups": 2, "head_dim": 8}
    freqs = freqs_of(angles, False)

    def attend(qkv):
        q, k, v = rope_qkv(qkv, *tables, **heads)
        q2, k2, v2 = rope_qkv(qkv * 2, *tables, **heads, copy_value=False)
        q3, k3, v3 = heads_of(rope_qkv_(qkv * 3, *tables, **heads), 4, 2, 8)
        k = rope(k, *tables, cp_size=1, interleaved=True) + fused_apply_rotary_pos_emb(k2, freqs)
        q3, k3 = rope_qk(q3, k3, *tables)
        return q + rope_(q2 * 1, *tables) + q3, k + k3, v + v2 + v3

    results = []
    for run in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        qkv = draw(4, 2, 64, dtype=torch.bfloat16, device=device).requires_grad_(wants_gradient)
        parts = run(qkv)
        gradients = ()
        if wants_gradient:
            upstream = [draw(*y.shape, dtype=y.dtype, device=device, seed=seed) for seed, y in enumerate(parts)]
            gradients = torch.autograd.grad(parts, qkv, upstream)
        results.append((*parts, *gradients))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


T, COS, QKV, FREQS = torch.ones(4, 1, 2, 8), torch.ones(8, 4), torch.ones(4, 1, 32), torch.ones(4, 1, 1, 8)
HEADS = {"num_heads": 2, "num_query_groups": 1, "head_dim": 8}
BAD = [
    (TypeError, "rope: t is int64", rope, (T.long(), COS, COS), {}),
    (TypeError, "rope: cos is float64", rope, (T, COS.double(), COS), {}),
    (TypeError, "rope_qk: k is int64", rope_qk, (T, T.long(), COS, COS), {}),
    (ValueError, r"rope_qk: q must be \(s, b, n, D\)", rope_qk, (COS, COS, COS, COS), {}),
    (ValueError, r"k must be as q is, float32 \(4, 1, 2, 8\).* given float32 \(4, 1, 2, 6\)", rope_qk,
     (T, T[..., :6], COS, COS), {}),
    (ValueError, "k must be as q is", rope_qk, (T, T[:3], COS, COS), {}),
    (ValueError, "k must be as q is", rope_qk, (T, T[:, :, :0], COS, COS), {}),
    (ValueError, "k must be as q is", rope_qk, (T, T.bfloat16(), COS, COS), {}),
    (ValueError, "k must be as q is", rope_qk, (T, T.to("meta"), COS, COS), {}),
    (ValueError, "rope_qk: position_offset is -1", rope_qk, (T, T, COS, COS), {"position_offset": -1}),
    (TypeError, "rope_qkv: qkv is int64", rope_qkv, (QKV.long(), COS, COS), HEADS),
    (ValueError, r"rope: t must be \(s, b, n, D\).*float32 \(8, 4\)", rope, (COS, COS, COS), {}),
    (ValueError, r"cos is float32 \(8, 5\).* from 1 to half of a head's 8", rope, (T, *[torch.ones(8, 5)] * 2), {}),
    (ValueError, r"and sin float32 \(8, 3\)", rope, (T, COS, COS[:, :3]), {}),
    (ValueError, r"cos is float32 \(8, 0\)", rope, (T, COS[:, :0], COS[:, :0]), {}),
    (ValueError, "positions go to 8; .* from 0 to 7", rope, (T, COS, COS), {"position_offset": 5}),
    (ValueError, "position_offset is -1", rope, (T, COS, COS), {"position_offset": -1}),
    (ValueError, "positions go to 11", rope, (T, COS, COS), {"cp_size": 3}),
    (ValueError, "cp_rank is 2 and cp_size 2", rope, (T, COS, COS), {"cp_size": 2, "cp_rank": 2}),
    (ValueError, "for 3 tokens.* two chunks of equal length", rope, (T[:3], COS, COS), {"cp_size": 2}),
    (ValueError, "cu_seqlens must be.*float32", rope, (T, COS, COS), {"cu_seqlens": COS[0]}),
    (ValueError, "at least one sequence", rope, (T, COS, COS), {"cu_seqlens": torch.tensor([0])}),
    (ValueError, "cu_seqlens must be on cpu", rope, (T, COS, COS), {"cu_seqlens": torch.ones(2).int().to("meta")}),
    (ValueError, "tables must be on cpu", rope, (T, COS.to("meta"), COS.to("meta")), {}),
    (ValueError, "get no gradient", rope, (T, COS.clone().requires_grad_(), COS), {}),
    (TypeError, "unexpected keyword argument 'offset'", rope_, (T, COS, COS), {"offset": 1}),
    (ValueError, "rope_: t is a leaf", rope_, (T.clone().requires_grad_(), COS, COS), {}),
    (ValueError, "share memory", rope_, (T[:, :, :1].expand(4, 1, 2, 8), COS, COS), {}),
    (ValueError, "side by side in t", rope_, (T.transpose(2, 3).contiguous().transpose(2, 3), COS, COS), {}),
    (ValueError, "rope_qkv_: groups must lie side by side", rope_qkv_,
     (torch.ones(4, 2, 2, 32).transpose(1, 2), COS, COS), {**HEADS, "num_heads": 4, "num_query_groups": 2}),
    (ValueError, "num_heads is 3, num_query_groups 2", rope_qkv, (QKV, COS, COS),
     {**HEADS, "num_heads": 3, "num_query_groups": 2}),
    (ValueError, r"qkv must be \(s, b, 48\) or .*\(1, 48\).* float32 \(4, 1, 32\)", rope_qkv, (QKV, COS, COS),
     {**HEADS, "num_heads": 4}),
    (ValueError, r"freqs must be .*float32 \(8, 4\)", fused_apply_rotary_pos_emb, (T, COS), {}),
    (ValueError, r"freqs must be .*\(4, 2, 1, 8\)", fused_apply_rotary_pos_emb, (T, FREQS.expand(4, 2, 1, 8)), {}),
    (ValueError, "positions go to 3; .* to 1", fused_apply_rotary_pos_emb, (T, FREQS[:2]), {}),
    (ValueError, "k_freqs must be the tensor", apply_fused_qkv_rotary_pos_emb,
     (QKV[:, :, None], FREQS, FREQS.clone(), [16, 8, 8]), {}),
    (ValueError, r"qkv_split_arg_list is \[16, 8, 4\]", apply_fused_qkv_rotary_pos_emb,
     (QKV[:, :, None], FREQS, FREQS, [16, 8, 4]), {}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "call", "arguments", "options"), BAD)
def test_bad_arguments(error, words, call, arguments, options):
    with pytest.raises(error, match=words):
        call(*arguments, **options)


@pytest.fixture(scope="module")
def _good_calls():
    """What lies close to the bad arguments is settled."""
    rope(T, COS, COS), rope(T, COS, COS, position_offset=4), rope(T, COS, COS, cp_size=2), rope(T[:3], COS, COS)
    rope(T, COS, COS, cu_seqlens=torch.tensor([0, 4])), fused_apply_rotary_pos_emb(T, FREQS)
    rope_(T.clone(), COS, COS), rope_qkv(QKV, COS, COS, **HEADS)
    rope_qkv_(torch.ones(4, 2, 2, 32), COS, COS, **{**HEADS, "num_heads": 4, "num_query_groups": 2})
    apply_fused_qkv_rotary_pos_emb(QKV[:, :, None], FREQS, FREQS, [16, 8, 8])


@pytest.mark.usefixtures("_good_calls")
@pytest.mark.parametrize(("error", "words", "call", "arguments", "options"), BAD)
def test_what_was_settled_lets_nothing_else_through(error, words, call, arguments, options):
    with pytest.raises(error, match=words):
        call(*arguments, **options)


@pytest.mark.skipif(not _launch.INTERPRETING, reason="on a CPU; GPUs get the same code")
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_the_second_call_finds_what_was_settled_wherever_it_starts(wants_gradient, monkeypatch):
    t, qkv = (draw(*shape).requires_grad_(wants_gradient) for shape in ((4, 2, 3, 8), (4, 2, 40)))
    angles, heads = angles_of(9, 4), {"num_heads": 3, "num_query_groups": 1, "head_dim": 8}
    tables = angles.cos().float(), angles.sin().float()
    for offset in (0, 5, 2, 0):
        turn = functools.partial(exact, angles=angles, positions=places(4, offset))
        parts = heads_of(qkv, 3, 1, 8)
        results = (
            rope(t, *tables, position_offset=offset),
            *rope_qkv(qkv, *tables, **heads, position_offset=offset),
            *rope_qkv(qkv, *tables, **heads, position_offset=offset, copy_value=not wants_gradient),
        )
        wanted = turn(t), *[*map(turn, parts[:2]), parts[2]] * 2
        for one, two in zip(results, wanted, strict=True):
            torch.testing.assert_close(one.double(), two.double(), rtol=1e-5, atol=1e-6)  # fp32 roundings
        if wants_gradient:
            (dt,) = torch.autograd.grad(results[0], t, t.detach())
            torch.testing.assert_close(dt.double(), turn(t.detach(), sign=-1), rtol=1e-5, atol=1e-6)
        monkeypatch.setattr("composer_kernels._rope_rules.check", None)


@pytest.mark.skipif(not _launch.INTERPRETING, reason="on a CPU; GPUs get the same code")
def test_numbers_that_are_no_integers_do_not_stay():
    qkv, tables = draw(5, 1, 32), (torch.ones(7, 4), torch.zeros(7, 4))
    with pytest.raises(TypeError, match="float"):
        rope_qkv(qkv, *tables, num_heads=2, num_query_groups=1, head_dim=8.0)
    q, _, _ = rope_qkv(qkv, *tables, **HEADS)
    assert torch.equal(q.flatten(), qkv[..., :16].flatten())


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
def test_past_two_to_the_31_elements(device, whole_gpu):
    """The last tokens come out as they do alone, packed and not."""
    whole_gpu(26)
    length = 2**19 + 8
    qkv = torch.randn(length, 1, 48 * 128, device=device, dtype=torch.bfloat16)
    cos, sin = (torch.randn(length, 64, device=device) for _ in range(2))
    call = functools.partial(rope_qkv, num_heads=32, num_query_groups=8, head_dim=128, copy_value=True)
    for one, two in zip(call(qkv, cos, sin), call(qkv[-16:], cos[-16:], sin[-16:]), strict=True):
        assert torch.equal(one[-16:], two)
    t = qkv.view(length, 1, 48, 128)
    assert torch.equal(rope(t, cos, sin)[-16:], rope(t[-16:], cos[-16:], sin[-16:]))


@needs_gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "groups", "dim", "half"), [(32, 8, 128, 64), (28, 4, 128, 64), (32, 8, 80, 16)])
def test_model_shapes(heads, groups, dim, half, interleaved, device, assert_as_good):
    qkv = draw(300, 2, (heads + 2 * groups) * dim, dtype=torch.bfloat16, device=device)
    angles = angles_of(300, half, device)
    sizes = {"num_heads": heads, "num_query_groups": groups, "head_dim": dim, "interleaved": interleaved}
    ours = rope_qkv(qkv, angles.cos().float(), angles.sin().float(), **sizes)
    for one, part in zip(ours[:2], heads_of(qkv, heads, groups, dim), strict=False):
        usual, true = (f(part, angles, range(300), interleaved) for f in (in_torch, exact))
        assert_as_good(one, usual, true)


@needs_gpu
def test_no_host_synchronisation_and_cuda_graph(device, assert_capturable):
    qkv = draw(64, 1, 48 * 64, dtype=torch.bfloat16, device=device)
    freqs, bounds = freqs_of(angles_of(64, 32, device), False), torch.tensor([0, 40, 64], device=device)
    upstream = [draw(64, 1, n, 64, dtype=torch.bfloat16, device=device, seed=n) for n in (32, 8, 8)]

    def step():
        leaf = qkv.detach().requires_grad_()  # its node belongs to the capturing stream
        parts = apply_fused_qkv_rotary_pos_emb(leaf.view(64, 1, 8, -1), freqs, freqs, [256, 64, 64])
        k = fused_apply_rotary_pos_emb_thd(parts[1].detach().squeeze(1), bounds, freqs)
        return *(part.detach() for part in parts), k, *torch.autograd.grad(parts, leaf, upstream)

    assert_capturable(step)
