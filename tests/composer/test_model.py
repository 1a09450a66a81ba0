"""The built model: every count, its function against plain PyTorch in float64, its first weights, its decoding."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.initialization import _draw_part, _initializer
from composer_megatron.model import build_model, initialize_weights
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS, Shape

torch.set_num_threads(1)

GROUPED = dataclasses.replace(PRESETS["tiny"], num_query_groups=2)


def architecture(sequence: str, shape: Shape = GROUPED, **changes) -> Architecture:
    return Architecture(CompositeSequence.parse(sequence), dataclasses.replace(shape, **changes))


def tokens(count: int = 12, vocab_size: int = 512) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, count), generator=torch.Generator().manual_seed(3))


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


@settings(max_examples=20, deadline=None)
@given(
    sequence=st.text("AM", min_size=1, max_size=8),
    tied=st.booleans(),
    heads=st.sampled_from([(4, 1), (4, 2), (6, 6)]),
    head_dim=st.sampled_from([8, 16]),
    vocab_size=st.integers(1, 300),
)
def test_a_model_has_exactly_the_parameters_of_its_architecture(sequence, tied, heads, head_dim, vocab_size):
    built = architecture(
        sequence,
        tied_embeddings=tied,
        num_attention_heads=heads[0],
        num_query_groups=heads[1],
        head_dim=head_dim,
        vocab_size=vocab_size,
    )
    model = build_model(built, max_sequence_length=16, meta=True)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(counts.values()) == built.params_total
    embeddings = sum(count for name, count in counts.items() if "embedding" in name or "output_layer" in name)
    assert embeddings == built.embedding_parameters
    norms = sum(count for name, count in counts.items() if "norm" in name)
    assert sum(counts.values()) - embeddings - norms == built.matrix_parameters


@pytest.mark.parametrize(
    ("preset", "sequence"),
    [
        ("350m", "8A18M"),
        ("1b", "4A9M4A5M2A5M"),
        ("3b", "6A15M6A9M3A9M"),
        ("8b", "7A17M7A10M4A10M"),
        *((preset, None) for preset in PRESETS),
    ],
)
def test_the_presets_on_the_meta_device(preset, sequence):
    shape = PRESETS[preset]
    pairs = CompositeSequence("AM" * shape.baseline_pairs)
    built = Architecture(CompositeSequence.parse(sequence) if sequence else pairs, shape)
    model = build_model(built, max_sequence_length=4096, dtype=torch.bfloat16, meta=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in model.parameters()) == built.params_total


def reference_logits(weights: dict[str, torch.Tensor], built: Architecture, ids: torch.Tensor) -> torch.Tensor:
    """The model of an architecture, written out; `weights` by Megatron's names."""
    shape = built.shape
    heads, groups, dim = shape.num_attention_heads, shape.num_query_groups, shape.head_dim
    batch, length = ids.shape
    frequencies = shape.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)[:, None]

    def norm(x, weight):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + shape.norm_epsilon) * weight

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def attention(x, weight):
        qkv = (x @ weight("self_attention.linear_qkv").T).view(batch, length, groups, heads // groups + 2, dim)
        query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        query, key = rotate(query), rotate(key)
        key, value = (tensor.repeat_interleave(heads // groups, 2) for tensor in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / dim**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)
        return mixed.flatten(2) @ weight("self_attention.linear_proj").T

    def mlp(x, weight):
        gate, up = (x @ weight("mlp.linear_fc1").T).chunk(2, -1)
        return (F.silu(gate) * up) @ weight("mlp.linear_fc2").T

    x = weights["embedding.word_embeddings.weight"][ids]
    for index, letter in enumerate(built.sequence):

        def weight(name, index=index):
            return weights[f"decoder.layers.{index}.{name}.weight"]

        block, norm_name = (attention, "input_layernorm") if letter == "A" else (mlp, "pre_mlp_layernorm")
        x = x + block(norm(x, weight(norm_name)), weight)
    x = norm(x, weights["decoder.final_norm.weight"])
    return x @ weights["embedding.word_embeddings.weight" if shape.tied_embeddings else "output_layer.weight"].T


@pytest.mark.parametrize("sequence", ["2A4M", "MAAM", "M", "A", "(AM)x3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_computes_what_the_architecture_says(sequence, tied):
    built = architecture(sequence, tied_embeddings=tied, rope_theta=10_000, norm_epsilon=1e-3, init_std=0.2)
    model = build_model(built, max_sequence_length=32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))  # weights that leaving one out would show
        weights = {name: parameter.double() for name, parameter in model.named_parameters()}
        ids = tokens()
        wanted = reference_logits(weights, built, ids)
        torch.testing.assert_close(model(ids, positions(ids), None).double(), wanted, rtol=1e-4, atol=1e-4)  # fp32
        labels = ids.roll(-1, 1)
        losses = model(ids, positions(ids), None, labels=labels).double()
        wanted_losses = F.cross_entropy(wanted.transpose(1, 2), labels, reduction="none")
        torch.testing.assert_close(losses, wanted_losses, rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_gives_the_logits_of_the_whole():
    built = architecture("2A3MA", init_std=0.2)
    model = build_model(built, max_sequence_length=32).eval()
    ids = tokens(10)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=16)
    with torch.no_grad():
        whole = model(ids, positions(ids), None)
        with InferenceMode.active():
            for start, end in [(0, 4), (4, 5), (5, 6), (6, 9), (9, 10)]:  # prompt, tokens, and several at once
                part = ids[:, start:end]
                position = torch.arange(start, end).expand_as(part)
                found = model(part, position, None, inference_context=context, runtime_gather_output=True)
                torch.testing.assert_close(found, whole[:, end - 1 : end], rtol=1e-4, atol=1e-4)  # fp32
                context.sequence_len_offset += end - start
    assert sorted(context.key_value_memory_dict) == [1, 2, 6]  # attention alone has a cache


def state(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_first_weights_depend_on_seed_and_name_alone():
    built = architecture("2A4M")
    first = state(build_model(built, max_sequence_length=16))
    torch.manual_seed(99)
    again, other = (state(build_model(built, max_sequence_length=16, seed=seed)) for seed in (1234, 1235))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if "norm" not in name]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    longer = state(build_model(architecture("2A5M"), max_sequence_length=16))
    same = [name for name in first if "layers" in name and "fc2" not in name and "proj" not in name]
    assert all(torch.equal(first[name], longer[name]) for name in same)  # the others' scale depends on the depth
    assert len({matrix.flatten()[0].item() for name, matrix in first.items() if name in matrices}) == len(matrices)


def test_weights_that_the_caller_loads_are_not_drawn(monkeypatch):
    monkeypatch.setattr("composer_megatron.model.initialize_weights", lambda *_: pytest.fail("drawn"))
    built = build_model(architecture("AM"), max_sequence_length=16, draw_weights=False)
    assert sum(parameter.numel() for parameter in built.parameters()) == architecture("AM").params_total


def test_drawing_leaves_the_callers_generator_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    build_model(architecture("AM"), max_sequence_length=16)
    assert torch.equal(torch.rand(3), wanted)


def test_the_scale_of_first_weights():
    built = architecture("4A8M", init_std=0.05, hidden_size=256)
    for name, matrix in state(build_model(built, max_sequence_length=16)).items():
        if "norm" in name:
            assert torch.equal(matrix, torch.ones_like(matrix))
            continue
        wanted = 0.05 / (12**0.5 if "fc2" in name or "proj" in name else 1)
        sigma_of_std = wanted / (2 * matrix.numel()) ** 0.5
        assert abs(matrix.std().item() - wanted) < 6 * sigma_of_std, name
        assert abs(matrix.mean().item()) < 6 * wanted / matrix.numel() ** 0.5, name


@given(
    ranks=st.integers(1, 4),
    stride=st.integers(1, 2),
    dim=st.integers(0, 1),
    part=st.integers(1, 3),
)
def test_the_ranks_parts_make_the_whole(ranks, stride, dim, part):
    """Row-parallel (dim 1), column-parallel (dim 0), and gate and up in one matrix (stride 2)."""
    size = [3, 3]
    size[dim] = part * stride

    def draw(matrix):
        matrix.copy_(torch.arange(matrix.numel(), dtype=torch.float32).view_as(matrix))

    parameter = torch.nn.Parameter(torch.empty(size))
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, stride
    parts = [_draw_part(parameter, draw, rank, ranks) for rank in range(ranks)]
    halves = [piece.chunk(stride, dim) for piece in parts]
    whole = torch.cat([half[index] for index in range(stride) for half in halves], dim)
    wanted = torch.empty(whole.shape)
    draw(wanted)
    assert torch.equal(whole, wanted)


def test_a_parameter_without_a_rule_is_an_error():
    model = build_model(architecture("M"), max_sequence_length=16)
    with pytest.raises(UsageError, match=r"no initialiser for parameter 'decoder.unheard.of'"):
        _initializer("decoder.unheard.of", model.config)
    model.decoder.register_parameter("strange", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UsageError, match=r"decoder\.strange"):
        initialize_weights(model, 1)


def test_a_pattern_must_be_the_architectures():
    with pytest.raises(UsageError, match=r"expected '\*\*----'"):
        build_model(architecture("2A4M"), max_sequence_length=16, pattern="**---")
