"""Every primitive's counts against the module that is built, its decoding against a whole pass, and its refusals."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from torch.utils.flop_counter import FlopCounterMode

from composer_megatron import arguments, cpu, guards
from composer_megatron.architecture import Architecture
from composer_megatron.block_config import block_fields
from composer_megatron.errors import ComposerError, FileError, ShapeError, UsageError
from composer_megatron.initialization import _draw_part
from composer_megatron.layers.delta_net import DeltaNet
from composer_megatron.layers.mamba import Mamba2Mixer
from composer_megatron.layout import Layout
from composer_megatron.model import build_model
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS, Shape
from composer_megatron.widths import DeltaNet as DeltaNetWidths
from composer_megatron.widths import Experts, Latent, Mamba

DERIVED = dataclasses.replace(PRESETS["tiny"], window=8, num_query_groups=2)
GIVEN = dataclasses.replace(
    DERIVED,
    name="given",
    experts=Experts(num_experts=4, top_k=3, ffn_hidden_size=24, shared_ffn_hidden_size=16),
    mamba=Mamba(num_heads=6, head_dim=12, num_groups=3, state_dim=10),
    delta_net=DeltaNetWidths(num_key_heads=2, num_value_heads=6, key_head_dim=12, value_head_dim=20, conv_width=3),
    latent=Latent(kv_rank=24, rope_dim=8, key_dim=12, value_dim=20, q_rank=16),
)
SHAPES = pytest.mark.parametrize("shape", [DERIVED, GIVEN], ids=["derived", "given"])
LETTERS = pytest.mark.parametrize("letter", list(PRIMITIVES))
EVERY = "AMWESG"
"""All but latent attention, which goes into no model beside A and W."""


@pytest.fixture(autouse=True)
def fresh():
    torch.set_num_threads(1)
    destroy_moe_metrics_tracker()  # it is as long as the first model of a process is deep


def make(letters, shape=DERIVED, **options):
    return build_model(Architecture(CompositeSequence(letters), shape), max_sequence_length=64, **options)


def logits(model, tokens, context=None, start=0):
    """(b, s, vocabulary); with a cache, of its last token alone."""
    places = torch.arange(start, start + tokens.shape[1]).expand_as(tokens)
    return model(tokens, places, None, inference_context=context, runtime_gather_output=context is not None)


@LETTERS
@SHAPES
def test_counts_are_those_of_the_module(letter, shape):
    row, architecture = PRIMITIVES[letter], Architecture(CompositeSequence(letter), shape)
    model = make(letter, shape)
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == architecture.params_total
    block = {name: value for name, value in parameters.items() if name.startswith("decoder.layers.")}
    matrices = [value for name, value in block.items() if value.dim() == 2 and "conv1d" not in name]
    assert sum(matrix.numel() for matrix in matrices) == row.matrix_parameters(shape)
    assert sum(value.numel() for value in block.values()) - row.matrix_parameters(shape) == row.vector_parameters(shape)
    whole = [value for value in block.values() if not getattr(value, "tensor_model_parallel", False)]
    assert sum(value.numel() for value in whole) == row.replicated_parameters(shape)


@LETTERS
@SHAPES
def test_a_token_meets_the_active_weights(letter, shape):
    """By PyTorch's own count of what is multiplied; recurrences and attention are batched products, and others."""
    architecture, tokens = Architecture(CompositeSequence(letter), shape), torch.randint(512, (2, 16))
    model = make(letter, shape).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits(model, tokens)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    head = shape.vocab_size * shape.hidden_size
    assert products == 2 * tokens.numel() * (architecture.active_parameters + head)


@given(seq_len=st.integers(1, 40), window=st.integers(1, 30))
def test_attention_flops_count_the_keys_that_each_query_sees(seq_len, window):
    shape = dataclasses.replace(GIVEN, window=window)
    each = 4 * shape.num_attention_heads * shape.head_dim
    full = sum(t * each for t in range(1, seq_len + 1))
    windowed = sum(min(t, window) * each for t in range(1, seq_len + 1))
    latent = sum(t * 2 * shape.num_attention_heads * (12 + 8 + 20) for t in range(1, seq_len + 1))
    assert PRIMITIVES["A"].mixing_flops(shape, seq_len) * seq_len == 2 * full
    assert PRIMITIVES["W"].mixing_flops(shape, seq_len) == 2 * windowed // seq_len
    assert PRIMITIVES["L"].mixing_flops(shape, seq_len) * seq_len == 2 * latent


def test_recurrences_cost_what_a_token_does_to_the_state():
    state, conv = 6 * 12 * 10, 4 * (72 + 2 * 3 * 10)
    assert PRIMITIVES["S"].mixing_flops(GIVEN, 99) == 2 * (2 * conv + state + 2 * state + 2 * state)
    state, conv = 6 * 12 * 20, 3 * (2 * 2 * 12 + 6 * 20)
    assert PRIMITIVES["G"].mixing_flops(GIVEN, 99) == 2 * (2 * conv + state + 3 * 2 * state)


@pytest.mark.parametrize("letter", "AMESG")
def test_flops_are_nearly_megatrons_own(letter):
    """It counts S²/2 keys, no router, and 7 FLOPs an element of Mamba's state and 8 of Gated DeltaNet's.

    Of windows and of latent attention in a hybrid model it knows nothing.
    """
    from megatron.training.training import num_floating_point_operations

    architecture = Architecture(CompositeSequence(letter), PRESETS["1b"])
    flags = arguments.architecture_flags(architecture, hybrid_pattern(architecture.sequence))
    parser, _ = arguments._megatron_parser()
    args = parser.parse_args([*arguments._tokens(flags), "--seq-length=4096"])
    head = 6 * 128_256 * 2048
    theirs = num_floating_point_operations(args, 1) / 4096 - head
    assert architecture.flops_per_token(4096) - head == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("letters", ["SM", "GM", "LM", "EA", "WM", EVERY])
@SHAPES
def test_decoding_is_a_whole_pass(letters, shape):
    """A prompt at once and then token by token, against all tokens at once; and what is kept meanwhile."""
    model = make(letters, shape, dtype=torch.float64).eval()
    tokens = torch.randint(512, (2, 14), generator=torch.Generator().manual_seed(0))
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=14)
    with torch.no_grad():
        wanted = logits(model, tokens)
        with InferenceMode.active():
            found = [logits(model, tokens[:, :6], context)]
            context.sequence_len_offset = 6
            context.enable_decode_mode()
            for place in range(6, 14):
                found.append(logits(model, tokens[:, place : place + 1], context, place))
                context.sequence_len_offset += 1
    # A router scores in float32, and Gated DeltaNet's gate is float32 in Megatron.
    assert torch.allclose(torch.cat(found, 1), wanted[:, 5:], atol=1e-5)
    kept = context.key_value_memory_dict
    for number, letter in enumerate(letters, start=1):
        if letter in "SG":
            elements = sum(state.numel() for state in kept[number]) // 2
            assert elements == PRIMITIVES[letter].state_elements(shape, 14)


def test_the_state_stops_growing():
    row, shape = PRIMITIVES["W"], DERIVED
    assert row.state_elements(shape, 5) == 5 * row.cache_elements(shape)
    assert row.state_elements(shape, 500) == shape.window * row.cache_elements(shape)
    architecture = Architecture(CompositeSequence("AWSGLM"), shape)
    grown = architecture.state_bytes(1001) - architecture.state_bytes(1000)
    assert grown == 2 * sum(PRIMITIVES[letter].cache_elements(shape) for letter in "AL")


def test_a_window_is_shorter_than_attention():
    tokens = torch.randint(512, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 3] += 1
    with torch.no_grad():
        moved = [(logits(model, tokens) - logits(model, changed)).abs().amax((0, 2)) for model in map(make, "WA")]
    reach = 3 + DERIVED.window  # the last query that sees position 3 is at 3 + window - 1
    assert moved[0][:3].max() == 0
    assert moved[0][3:reach].min() > 0
    assert moved[0][reach:].max() == 0
    assert moved[1][3:].min() > 0


def test_the_configuration_says_which_attention_has_a_window():
    model = make("AWMW")
    attention = [model.decoder.layers[place].self_attention.core_attention for place in (0, 1, 3)]
    assert [each.window for each in attention] == [None, 7, 7]  # Megatron counts the keys before a query's own


@pytest.mark.parametrize("letters", [EVERY, "LE", "AM"])
@SHAPES
def test_flags_say_what_the_configuration_says(letters, shape):
    architecture = Architecture(CompositeSequence(letters), shape)
    flags = arguments.architecture_flags(architecture, hybrid_pattern(architecture.sequence))
    parsed = arguments.given_flags(arguments._tokens(flags))
    for name, wanted in block_fields(architecture).items():
        found = parsed.get({"num_moe_experts": "num_experts"}.get(name, name))
        assert found in (wanted, [wanted]), name  # Megatron takes lists of some
    assert arguments.contradictions(flags, parsed) == []


def test_latent_attention_goes_beside_no_other():
    for text in ("LA", "WL"):
        with pytest.raises(UsageError, match=rf"L \(latent attention\) and {'A' if 'A' in text else 'W'} do not go"):
            hybrid_pattern(CompositeSequence(text))
    assert hybrid_pattern(CompositeSequence("LELM")) == "+E+-"


@pytest.mark.parametrize(("letter", "package"), [("S", "mamba_ssm, causal_conv1d"), ("G", "fla")])
def test_a_missing_package_is_named(letter, package, monkeypatch):
    kind = {"S": Mamba2Mixer, "G": DeltaNet}[letter]
    monkeypatch.setattr(cpu, "has_gpu", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ComposerError, match=rf"on a GPU needs {package}.*pip install.*--backend-part recurrence=local"):
        kind(None, kernels=True)


@pytest.mark.parametrize(("letters", "refused"), [("EM", "E"), ("MG", "G"), ("SM", None), ("LM", None)])
def test_tensor_parallelism_that_would_be_wrong(letters, refused):
    config = make(letters).config
    config.tensor_model_parallel_size = 2
    symbols = hybrid_pattern(CompositeSequence(letters))
    if refused is None:
        guards.check_tensor_parallelism(symbols, config)
        return
    with pytest.raises(UsageError, match=rf"^{refused} \(.*\) under tensor parallelism .* --sequence-parallel"):
        guards.check_tensor_parallelism(symbols, config)


@pytest.mark.parametrize(
    ("letters", "ranks", "message"),
    [
        ("EM", 2, None),
        ("EM", 3, "num_attention_heads"),
        ("SM", 2, r"tensor_parallel=2 does not divide mamba.num_groups=3"),
        ("LM", 2, r"latent.kv_rank \+ rope_dim=31"),
    ],
)
def test_ranks_must_divide_the_widths_of_the_blocks(letters, ranks, message):
    shape = dataclasses.replace(GIVEN, latent=Latent(kv_rank=23, rope_dim=8, key_dim=12, value_dim=20))
    architecture = Architecture(CompositeSequence(letters), shape)
    if message is None:
        Layout(tensor_parallel=ranks).check(architecture)
        return
    with pytest.raises(UsageError, match=message):
        Layout(tensor_parallel=ranks).check(architecture)


def test_flags_of_the_architectures_own_blocks():
    architecture = Architecture(CompositeSequence("WEM"), DERIVED)
    guards.check_flags({"expert_model_parallel_size": 2, "hybrid_layer_pattern": "*E|-"}, architecture)
    for given_, message in (
        ({"window_size": (4, 0)}, "--window-size .*: the architecture's sequence and shape say it"),
        ({"num_experts": 4}, "--num-experts .*: the architecture's sequence and shape say it"),
        ({"hybrid_layer_pattern": "MM"}, r"'MM': 'M' is no block .*; expected - and \* and E"),
    ):
        with pytest.raises(UsageError, match=message):
            guards.check_flags(given_, architecture)


def test_mamba_has_no_place_in_the_gpt_model():
    from composer_megatron.gpt_spec import block_spec

    architecture = Architecture(CompositeSequence("SM"), DERIVED)
    with pytest.raises(UsageError, match=r"Mamba-2 \(S\) has no place in Megatron's GPTModel; use pretrain_hybrid.py"):
        block_spec(architecture, make("AM").config)
    with pytest.raises(UsageError, match=r"--num-experts: is None, the architecture has 8"):
        block_spec(Architecture(CompositeSequence("AE"), DERIVED), make("AM").config)


def test_a_checkpoint_knows_its_blocks():
    for letters in (EVERY, "LE"):
        names = make(letters).sharded_state_dict().keys()
        assert guards.saved_blocks(names) == letters.replace("W", "A")


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), ranks=st.integers(1, 3), dim=st.integers(0, 1))
@settings(max_examples=30)
def test_each_rank_draws_its_slice_of_every_matrix_in_one(sizes, ranks, dim):
    def draw(matrix):
        matrix.copy_(torch.arange(matrix.numel()).view_as(matrix))

    shape = [2, 2]
    shape[dim] = sum(sizes)
    parameter = torch.nn.Parameter(torch.empty(shape))
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_sizes = True, dim, sizes
    parts = [_draw_part(parameter, draw, rank, ranks).split(sizes, dim) for rank in range(ranks)]
    whole = torch.cat([torch.cat(slices, dim) for slices in zip(*parts, strict=True)], dim)
    wanted = torch.empty_like(whole)
    draw(wanted)
    assert torch.equal(whole, wanted)


class TestWidths:
    def test_files_from_before_still_load(self, tmp_path):
        shape = DERIVED.as_dict()
        for name in ("window", "experts", "mamba", "delta_net", "latent"):
            del shape[name]
        file = {"format": "composer-architecture", "version": 1, "sequence": "2A4M", "shape": shape, "origin": {}}
        (tmp_path / "old.json").write_text(json.dumps(file))
        old = Architecture.load(tmp_path / "old.json")
        assert old == Architecture(CompositeSequence("AAMMMM"), dataclasses.replace(DERIVED, window=1024))

    def test_files_keep_them(self, tmp_path):
        written = Architecture(CompositeSequence(EVERY), GIVEN)
        written.save(tmp_path / "new.json")
        assert Architecture.load(tmp_path / "new.json") == written

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"experts": {"num_experts": 4, "top_k": 5, "ffn_hidden_size": 8}}, "top_k=5; expected at most num_exp"),
            ({"experts": {"num_expert": 4}}, "unknown field 'num_expert'; did you mean 'num_experts'"),
            ({"experts": {"num_experts": 4}}, "experts: missing top_k, ffn_hidden_size"),
            ({"mamba": {"num_heads": 6, "head_dim": 8, "num_groups": 4, "state_dim": 8}}, "num_groups=4; .* divisor"),
            ({"latent": {"kv_rank": 8, "rope_dim": 3, "key_dim": 8, "value_dim": 8}}, "rope_dim=3; expected an even"),
            ({"delta_net": 3}, "delta_net: expected an object with num_key_heads"),
            ({"window": 0}, "window=0; expected a whole number of at least 1"),
        ],
    )
    def test_impossible_ones_are_named(self, values, message, tmp_path):
        with pytest.raises(ShapeError, match=message):
            Shape.from_dict(DERIVED.as_dict() | values)
        file = {"format": "composer-architecture", "version": 1, "sequence": "A", "shape": DERIVED.as_dict() | values}
        (tmp_path / "bad.json").write_text(json.dumps(file))
        with pytest.raises(FileError, match=message):
            Architecture.load(tmp_path / "bad.json")

    @pytest.mark.parametrize("name", PRESETS)
    def test_every_preset_has_every_primitive(self, name):
        """And an E costs a token what an M does, its router aside."""
        shape = PRESETS[name]
        for row in PRIMITIVES.values():
            assert row.matrix_parameters(shape) >= row.active_parameters(shape) > 0
        router = shape.hidden_size * shape.expert_widths.num_experts
        assert PRIMITIVES["E"].active_parameters(shape) == PRIMITIVES["M"].active_parameters(shape) + router
