"""Norms, activation, attention and rotary angles against their formulas in float64; who holds which tokens."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from composer_megatron.errors import UsageError
from composer_megatron.layers import fused_rope
from composer_megatron.layers.activation import SwiGLU
from composer_megatron.layers.attention import CoreAttention, SDPACoreAttention
from composer_megatron.layers.context_parallel import document_chunk, in_order, packed_prefixes, prefixes
from composer_megatron.layers.fused_attention import FusedCoreAttention
from composer_megatron.layers.fused_norm import FusedRMSNorm
from composer_megatron.layers.norm import RMSNorm
from composer_megatron.layers.rope import angles_on_this_rank

torch.set_num_threads(1)

# Rounding of the result itself, and a few ulp for sums in another order.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def config(**changes) -> TransformerConfig:
    widths = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    return TransformerConfig(**(widths | {"normalization": "RMSNorm", "attention_dropout": 0.0} | changes))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


NORMS, ATTENTIONS = (RMSNorm, FusedRMSNorm), (SDPACoreAttention, FusedCoreAttention)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_norm_and_its_gradients_follow_the_formula(kind, dtype, eps):
    torch.manual_seed(0)
    norm = kind(config(params_dtype=dtype), 48, eps)
    norm.weight.data.copy_(torch.randn(48))
    x = (3 * torch.randn(5, 2, 48)).to(dtype).requires_grad_()
    reference_x, reference_weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    wanted = norm_reference(reference_x, reference_weight, eps)
    found = norm(x)
    close(found, wanted)
    grad = torch.randn(5, 2, 48).to(dtype)
    found.backward(grad)
    wanted.backward(grad.double())
    close(x.grad, reference_x.grad)
    torch.testing.assert_close(
        norm.weight.grad.double(), reference_weight.grad, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype]
    )  # a sum over ten rows


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_norm_of_a_sum_is_the_norm_of_the_stream_after_it(kind, stream):
    """Under blocks in bf16; the norm's output is theirs, the sum stays what the stream is."""
    torch.manual_seed(0)
    norm = kind(config(params_dtype=torch.bfloat16, fp32_residual_connection=stream == torch.float32), 48)
    delta, residual = torch.randn(5, 48).bfloat16(), (10 * torch.randn(5, 48)).to(stream)
    y, total = norm(delta, residual)
    assert (y.dtype, total.dtype) == (torch.bfloat16, stream)
    assert torch.equal(total, (residual.double() + delta.double()).to(stream))
    close(y, norm_reference(total, norm.weight, 1e-5))
    again = norm(total)
    assert again.dtype == torch.bfloat16
    close(again, y)


@pytest.mark.parametrize("kind", NORMS)
def test_norm_marks_its_weight_for_sequence_parallelism(kind):
    parallel = config(sequence_parallel=True, tensor_model_parallel_size=2)
    assert kind(parallel, 8).weight.sequence_parallel is True
    assert kind(config(), 8).weight.sequence_parallel is False


@pytest.mark.parametrize("wish", [{"normalization": "LayerNorm"}, {"layernorm_zero_centered_gamma": True}])
def test_norm_refuses_another_norm(wish):
    with pytest.raises(UsageError, match=next(iter(wish))):
        RMSNorm(config(**wish), 8)


def swiglu_config(**changes) -> TransformerConfig:
    return config(**({"gated_linear_unit": True, "activation_func": F.silu} | changes))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_swiglu_takes_the_gate_from_the_first_half(limit):
    torch.manual_seed(0)
    x = torch.randn(5, 2, 12)
    gate, up = x.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    found = SwiGLU(config=swiglu_config(activation_func_clamp_value=limit))(x)
    close(found, gate.double() * torch.sigmoid(gate.double()) * up.double())


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"activation_func": F.gelu}, "SwiGLU"),
        ({"gated_linear_unit": False}, "SwiGLU"),
        ({"glu_linear_offset": 1.0, "bias_activation_fusion": False}, "glu_linear_offset"),
    ],
)
def test_swiglu_refuses_another_activation(wish, named):
    with pytest.raises(UsageError, match=named):
        SwiGLU(config=swiglu_config(**wish))


def attention(kind: type[CoreAttention] = SDPACoreAttention, **changes) -> CoreAttention:
    wishes = {"attention_type": "self", "attn_mask_type": AttnMaskType.causal} | {
        name: changes.pop(name) for name in ("attention_type", "attn_mask_type", "softmax_scale") if name in changes
    }
    return kind(config=config(**changes), layer_number=1, cp_comm_type=None, pg_collection=None, **wishes)


def attention_reference(query, key, value, scale, hidden=None, window=None):
    """Loops over batch, head and query; `hidden` (b, 1, sq, sk) is True where a query must not see a key."""
    queries, batch, heads, dim = query.shape
    keys, groups = key.shape[0], key.shape[2]
    output = torch.zeros(queries, batch, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // groups)
            for i in range(queries):
                visible = [
                    j
                    for j in range(keys)
                    if j <= i + keys - queries
                    and (window is None or j >= i + keys - queries - window)
                    and not (hidden is not None and hidden[b, 0, i, j])
                ]
                scores = torch.stack([query[i, b, h] @ key[j, b, group] for j in visible]) * scale
                weights = torch.softmax(scores, 0)
                output[i, b, h] = sum(w * value[j, b, group] for w, j in zip(weights, visible, strict=True))
    return output.reshape(queries, batch, heads * dim)


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 7),
    past=st.integers(0, 5),
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    repeat=st.integers(1, 3),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 0, 2, 20]),
    kind=st.sampled_from(ATTENTIONS),
)
def test_attention_follows_the_formula(queries, past, batch, groups, repeat, masked, scale, window, kind):
    torch.manual_seed(queries + 10 * past)
    keys = queries + past
    query = torch.randn(queries, batch, groups * repeat, 8)
    key, value = torch.randn(keys, batch, groups, 8), torch.randn(keys, batch, groups, 8)
    hidden = None
    if masked:
        hidden = torch.rand(batch, 1, queries, keys) < 0.3
        hidden.diagonal(past, -2, -1).fill_(False)  # every query sees itself
    layer = attention(kind, softmax_scale=scale, window_size=None if window is None else (window, 0))
    found = layer(query, key, value, hidden, attn_mask_type=AttnMaskType.causal)
    wanted = attention_reference(query.double(), key.double(), value.double(), scale or 8**-0.5, hidden, window)
    close(found, wanted)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_gradients_follow_the_formula(kind):
    torch.manual_seed(0)
    tensors = [torch.randn(6, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    grad = torch.randn(6, 2, 32)
    attention(kind)(*tensors, None, attn_mask_type=AttnMaskType.causal).backward(grad)
    attention_reference(*doubles, 8**-0.5).backward(grad.double())
    for tensor, double in zip(tensors, doubles, strict=True):
        close(tensor.grad, double.grad)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_decoding_one_token_is_the_last_row_of_the_whole(kind):
    torch.manual_seed(0)
    query, key, value = torch.randn(9, 2, 4, 8), torch.randn(9, 2, 2, 8), torch.randn(9, 2, 2, 8)
    layer = attention(kind)
    whole = layer(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    last = layer(query[-1:], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    close(last, whole[-1:])


def packed(lengths: list[int], **changes) -> PackedSeqParams:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    wishes = {"qkv_format": "thd", "cu_seqlens_q": ends, "cu_seqlens_kv": ends}
    return PackedSeqParams(**(wishes | {"max_seqlen_q": longest, "max_seqlen_kv": longest} | changes))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    window=st.sampled_from([None, 1]),
    kind=st.sampled_from(ATTENTIONS),
)
def test_packed_sequences_attend_each_to_itself(lengths, window, kind):
    torch.manual_seed(sum(lengths))
    whole = [torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    layer = attention(kind, window_size=None if window is None else (window, 0))
    grad = torch.randn(sum(lengths), 32)
    found = layer(*whole, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed(lengths))
    gradients = torch.autograd.grad(found, whole, grad)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        part = [tensor[here].detach().double()[:, None].requires_grad_() for tensor in whole]
        wanted = attention_reference(*part, 8**-0.5, window=window)[:, 0]
        close(found[here], wanted)
        for gradient, expected in zip(gradients, torch.autograd.grad(wanted, part, grad[here].double()), strict=True):
            close(gradient[here], expected[:, 0])
        start += length


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_padding_behind_packed_sequences_changes_nothing_before_it(kind):
    torch.manual_seed(0)
    whole = [torch.randn(12, heads, 8) for heads in (4, 2, 2)]
    real = [tensor[[0, 1, 2, 5, 6, 7, 8]] for tensor in whole]
    wanted = attention(kind)(*real, None, packed_seq_params=packed([3, 4]))
    padded = torch.tensor([0, 5, 12]).int()
    params = packed([3, 4], cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded, max_seqlen_q=7, max_seqlen_kv=7)
    close(attention(kind)(*whole, None, packed_seq_params=params)[[0, 1, 2, 5, 6, 7, 8]], wanted)


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"window_size": (-1, 0)}, "window_size"),
        ({"window_size": (3, 2)}, "window_size"),
        ({"attention_type": "cross"}, "attention_type='cross'"),
        ({"attn_mask_type": AttnMaskType.padding}, "padding"),
    ],
)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_refuses_what_it_cannot_do(kind, wish, named):
    with pytest.raises(UsageError, match=named):
        attention(kind, **wish)


def test_context_parallel_attention_refuses_another_exchange():
    wishes = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "cp_comm_type": "a2a"}
    with pytest.raises(UsageError, match=r"cp_comm_type='a2a'.*use 'all_gather'"):
        SDPACoreAttention(config=config(context_parallel_size=2), layer_number=1, **wishes)


def test_attention_refuses_inputs_that_it_would_ignore():
    tensor = torch.randn(3, 1, 4, 8)
    flat, mask = tensor[:, 0], torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(UsageError, match="attention_bias"):
        attention()(tensor, tensor, tensor, None, attention_bias=tensor)
    with pytest.raises(UsageError, match="--no-create-attention-mask-in-dataloader"):
        attention()(flat, flat, flat, mask, packed_seq_params=packed([3]))
    with pytest.raises(UsageError, match="qkv_format='sbhd'"):
        attention()(flat, flat, flat, None, packed_seq_params=packed([3], qkv_format="sbhd"))
    with pytest.raises(UsageError, match="local_cp_size=2"):
        attention()(flat, flat, flat, None, packed_seq_params=packed([3], local_cp_size=2))
    with pytest.raises(UsageError, match="packed sequences end at 2 and 2, of 3 queries"):
        attention()(flat, flat, flat, None, packed_seq_params=packed([2]))


def own_tokens(rank: int, ranks: int, start: int, length: int) -> list[int]:
    """Of one sequence, chunk `rank` of 2 · `ranks` and the one as far from the end."""
    chunk = length // (2 * ranks)
    return [start + place * chunk + offset for place in (rank, 2 * ranks - 1 - rank) for offset in range(chunk)]


@given(ranks=st.integers(1, 5), chunk=st.integers(1, 3))
def test_chunks_of_all_ranks_are_put_in_order(ranks, chunk):
    length = 2 * ranks * chunk
    gathered = torch.tensor([token for rank in range(ranks) for token in own_tokens(rank, ranks, 0, length)])
    assert torch.equal(in_order(gathered, ranks), torch.arange(length))
    for rank in range(ranks):
        ends = [own_tokens(rank, ranks, 0, length)[place * chunk + chunk - 1] + 1 for place in range(2)]
        assert [round(share * length) for share in prefixes(rank, ranks)] == ends


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3),
    place=st.integers(0, 3),
    window=st.sampled_from([None, 2]),
    kind=st.sampled_from(ATTENTIONS),
)
def test_a_chunk_of_rows_sees_its_documents_and_no_others(rows, place, window, kind):
    """Rows of 8 tokens, in which documents end anywhere; chunks of 2."""
    torch.manual_seed(place)
    begins = torch.tensor([[True, *row] for row in rows])  # where a document begins
    document = begins.flatten().cumsum(0).view(len(rows), 8)
    ends = torch.cat((begins.flatten().nonzero().flatten(), torch.tensor([8 * len(rows)]))).int()
    chunk, seen = slice(2 * place, 2 * place + 2), slice(0, 2 * place + 2)
    whole = [torch.randn(8, len(rows), heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    apart = (document[:, :, None] != document[:, None, :])[:, None]
    wanted = attention_reference(*(tensor.double() for tensor in whole), 8**-0.5, apart, window)[chunk]
    layer = attention(kind, window_size=None if window is None else (window, 0))
    given = (whole[0][chunk], whole[1][seen], whole[2][seen])
    joined = (tensor.transpose(0, 1).flatten(0, 1) for tensor in given)
    found = layer.attend_to_packed(*joined, document_chunk(ends, 8, 2 * place, 2))
    found = found.unflatten(0, (len(rows), 2)).transpose(0, 1).flatten(-2)
    close(found, wanted)
    gradients = (torch.autograd.grad(output.double().sum(), whole) for output in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        close(one, other)


@given(ranks=st.integers(1, 4), chunks=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
def test_packed_query_chunks_see_the_prefixes_of_their_sequences(ranks, chunks):
    lengths = [2 * ranks * chunk for chunk in chunks]
    starts = [0, *itertools.accumulate(lengths)]
    boundaries = torch.tensor(starts).int()
    held = [
        [
            token
            for start, length in zip(starts, lengths, strict=False)
            for token in own_tokens(rank, ranks, start, length)
        ]
        for rank in range(ranks)
    ]
    gathered = torch.tensor(list(itertools.chain(*held)))
    for rank in range(ranks):
        packing, places = packed_prefixes(boundaries, max(lengths), len(held[rank]), rank, ranks)
        seen = gathered[places].tolist()
        expected, queries = [], 0
        for start, chunk in zip(starts, chunks, strict=False):
            for end in (rank + 1, 2 * ranks - rank):
                expected.append(list(range(start, start + end * chunk)))
                assert expected[-1][-chunk:] == held[rank][queries : queries + chunk] or not chunk
                queries += chunk
        keys = packing.keys.tolist()
        assert [seen[first:last] for first, last in itertools.pairwise(keys)] == expected
        assert packing.queries.tolist()[-1] == queries == len(held[rank])
        assert packing.most_keys == max(map(len, expected))
        assert packing.most_queries == max(chunks)


@pytest.mark.parametrize("dim", [0, 1])
def test_angles_are_those_of_the_ranks_tokens(dim):
    angles = torch.arange(12.0)[:, None].expand(12, 2)
    angles = angles if dim == 0 else angles.t()
    for rank in range(3):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 3)
        found = angles_on_this_rank(angles, dim, group)
        assert found.select(1 - dim, 0).tolist() == own_tokens(rank, 3, 0, 12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_installed_rotary_embedding_is_megatrons(interleaved, dtype):
    fused_rope.install()
    torch.manual_seed(0)
    t = torch.randn(6, 2, 3, 8, dtype=dtype)
    angles = torch.randn(6, 1, 1, 4)
    angles = torch.stack((angles, angles), -1).flatten(-2) if interleaved else torch.cat((angles, angles), -1)
    wanted = rope_utils._apply_rotary_pos_emb_bshd(t, angles.to(dtype), rotary_interleaved=interleaved)
    found = rope_utils.fused_apply_rotary_pos_emb(t, angles, interleaved=interleaved)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # fp32
    ends = torch.tensor([0, 2, 6]).int()
    found = rope_utils.fused_apply_rotary_pos_emb_thd(t[:, 0], ends, angles[:4], interleaved=interleaved)
    for start, end in ((0, 2), (2, 6)):
        wanted = rope_utils._apply_rotary_pos_emb_bshd(
            t[start:end, :1], angles[: end - start].to(dtype), rotary_interleaved=interleaved
        )
        torch.testing.assert_close(found[start:end], wanted[:, 0], rtol=1e-6, atol=1e-6)
