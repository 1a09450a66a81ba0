"""RMSNorm and attention against their formulas in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from composer_megatron.errors import UsageError
from composer_megatron.layers.attention import SDPACoreAttention
from composer_megatron.layers.norm import RMSNorm

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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_norm_and_its_gradients_follow_the_formula(dtype, eps):
    torch.manual_seed(0)
    norm = RMSNorm(config(params_dtype=dtype), 48, eps)
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


def test_norm_marks_its_weight_for_sequence_parallelism():
    parallel = config(sequence_parallel=True, tensor_model_parallel_size=2)
    assert RMSNorm(parallel, 8).weight.sequence_parallel is True
    assert RMSNorm(config(), 8).weight.sequence_parallel is False


@pytest.mark.parametrize("wish", [{"normalization": "LayerNorm"}, {"layernorm_zero_centered_gamma": True}])
def test_norm_refuses_another_norm(wish):
    with pytest.raises(UsageError, match=next(iter(wish))):
        RMSNorm(config(**wish), 8)


def attention(**changes) -> SDPACoreAttention:
    wishes = {"attention_type": "self", "attn_mask_type": AttnMaskType.causal} | {
        name: changes.pop(name) for name in ("attention_type", "attn_mask_type", "softmax_scale") if name in changes
    }
    return SDPACoreAttention(config=config(**changes), layer_number=1, cp_comm_type=None, pg_collection=None, **wishes)


def attention_reference(query, key, value, scale, hidden=None):
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
                    if j <= i + keys - queries and not (hidden is not None and hidden[b, 0, i, j])
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
)
def test_attention_follows_the_formula(queries, past, batch, groups, repeat, masked, scale):
    torch.manual_seed(queries + 10 * past)
    keys = queries + past
    query = torch.randn(queries, batch, groups * repeat, 8)
    key, value = torch.randn(keys, batch, groups, 8), torch.randn(keys, batch, groups, 8)
    hidden = None
    if masked:
        hidden = torch.rand(batch, 1, queries, keys) < 0.3
        hidden[..., 0] = False  # every query sees something
    found = attention(softmax_scale=scale)(query, key, value, hidden, attn_mask_type=AttnMaskType.causal)
    wanted = attention_reference(query.double(), key.double(), value.double(), scale or 8**-0.5, hidden)
    close(found, wanted)


def test_attention_gradients_follow_the_formula():
    torch.manual_seed(0)
    tensors = [torch.randn(6, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    grad = torch.randn(6, 2, 32)
    attention()(*tensors, None, attn_mask_type=AttnMaskType.causal).backward(grad)
    attention_reference(*doubles, 8**-0.5).backward(grad.double())
    for tensor, double in zip(tensors, doubles, strict=True):
        close(tensor.grad, double.grad)


def test_decoding_one_token_is_the_last_row_of_the_whole():
    torch.manual_seed(0)
    query, key, value = torch.randn(9, 2, 4, 8), torch.randn(9, 2, 2, 8), torch.randn(9, 2, 2, 8)
    layer = attention()
    whole = layer(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    last = layer(query[-1:], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    close(last, whole[-1:])


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"context_parallel_size": 2}, "context_parallel_size=2"),
        ({"window_size": (4, 0)}, "window_size"),
        ({"attention_type": "cross"}, "attention_type='cross'"),
        ({"attn_mask_type": AttnMaskType.padding}, "padding"),
    ],
)
def test_attention_refuses_what_it_cannot_do(wish, named):
    with pytest.raises(UsageError, match=named):
        attention(**wish)


@pytest.mark.parametrize("argument", ["packed_seq_params", "attention_bias"])
def test_attention_refuses_inputs_that_it_would_ignore(argument):
    tensor = torch.randn(3, 1, 4, 8)
    with pytest.raises(UsageError, match=argument):
        attention()(tensor, tensor, tensor, None, attn_mask_type=AttnMaskType.causal, **{argument: SimpleNamespace()})
