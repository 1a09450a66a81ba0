"""Backends play the parts; which one plays them changes neither parameters nor numbers."""

import dataclasses
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer import attention

from composer_megatron import backend as backends
from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.arguments import Flags, backend_flags, given_flags, parse_options
from composer_megatron.backend import BACKENDS, PARTS, get_backend
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.guards import settle_joined_rope
from composer_megatron.layers import fused_rope, wgrad
from composer_megatron.model import CompositeModel, build_model
from composer_megatron.packages import check_packages
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS, Shape
from composer_megatron.specs import LAYERS, stack_spec

torch.set_num_threads(1)
SHAPE = Shape(
    name="test",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=96,
    tied_embeddings=False,
    baseline_pairs=2,
    rope_theta=1000,
    norm_epsilon=1e-4,
    init_std=0.3,
)


def model(letters: str, *, tied: bool = False, **kwargs) -> CompositeModel:
    shape = SHAPE.__class__(**(SHAPE.__dict__ | {"tied_embeddings": tied}))
    return build_model(Architecture(CompositeSequence(letters), shape), max_sequence_length=16, **kwargs)


def losses_and_gradients(built: CompositeModel) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, SHAPE.vocab_size, (2, 12), generator=torch.Generator().manual_seed(4))
    losses = built(tokens, torch.zeros_like(tokens), None, labels=tokens.roll(-1, 1))
    losses.double().pow(2).sum().backward()
    return {"loss": losses.detach().double()} | {name: weight.grad for name, weight in built.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        # Megatron's angles and its loss are in fp32 whatever the type of the model: two such roundings.
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6 * value.abs().max().item(), msg=name)


@settings(max_examples=8, deadline=None)
@given(st.text("AM", min_size=1, max_size=5), st.booleans(), st.booleans())
def test_composer_computes_what_local_computes(letters, tied, linear_loss):
    """In float64: losses and every gradient, and the names in a checkpoint."""
    parts = {"loss": "linear"} if linear_loss else {}
    ours = model(letters, tied=tied, dtype=torch.float64, backend="composer", parts=parts)
    wanted = model(letters, tied=tied, dtype=torch.float64, backend="local")
    assert list(ours.state_dict()) == list(wanted.state_dict())
    assert_close(losses_and_gradients(ours), losses_and_gradients(wanted))


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("optimizer", "gradient_accumulation")])
def test_one_part_by_another_backend(part):
    mixed = get_backend("composer", {part: "local"})
    assert getattr(mixed, part) is getattr(get_backend("local"), part)
    assert mixed.name == f"composer+{part}=local"
    found = losses_and_gradients(model("AMA", dtype=torch.float64, backend="composer", parts={part: "local"}))
    assert_close(found, losses_and_gradients(model("AMA", dtype=torch.float64, backend="local")))


@pytest.mark.parametrize("name", ["composer", "local"])
def test_every_backend_builds_the_same_parameters(name):
    architecture = Architecture(CompositeSequence.parse("2A4M"), PRESETS["tiny"])
    built = build_model(architecture, max_sequence_length=16, backend=name, meta=True)
    found = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    wanted = build_model(architecture, max_sequence_length=16, backend="local", meta=True)
    assert found == {name: tuple(parameter.shape) for name, parameter in wanted.named_parameters()}


class TestJoinedRope:
    """The rotary embedding takes query, key and value as the projection left them, where that can be."""

    @pytest.mark.parametrize("letters", ["A", "AMAAM"])
    def test_it_computes_what_the_parts_one_after_the_other_do(self, letters, monkeypatch):
        calls = self.count(monkeypatch)
        found = losses_and_gradients(model(letters, dtype=torch.float32, backend="composer"))
        assert len(calls) == letters.count("A")
        apart = model(letters, dtype=torch.float32, backend="composer", parts={"rope": "apart"})
        wanted = losses_and_gradients(apart)
        assert len(calls) == letters.count("A")  # none more
        assert_close(found, wanted)

    @staticmethod
    def count(monkeypatch) -> list[int]:
        """One entry for each call to come of the function that takes all three."""
        get_backend("composer").install()
        calls: list[int] = []
        turn = attention.apply_fused_qkv_rotary_pos_emb
        monkeypatch.setattr(fused_rope, "_apply_to_joined", lambda *args: calls.append(0) or turn(*args))
        fused_rope.install()
        return calls

    def test_generation_and_packed_sequences_have_them_apart(self, monkeypatch):
        """With the same numbers, also where backward runs the layers again."""
        calls = self.count(monkeypatch)
        built = model("AM", dtype=torch.float32, backend="composer")
        tokens = torch.randint(0, SHAPE.vocab_size, (1, 12), generator=torch.Generator().manual_seed(4))
        positions = torch.arange(12)[None]
        whole = built(tokens, positions, None)
        assert len(calls) == 1
        starts = torch.tensor([0, 12], dtype=torch.int32)
        packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=12, max_seqlen_kv=12)
        torch.testing.assert_close(built(tokens, positions, None, packed_seq_params=packed), whole)
        context = StaticInferenceContext(1, 16)
        torch.testing.assert_close(built(tokens, positions, None, inference_context=context), whole)
        assert len(calls) == 1
        assert built.config.fused_single_qkv_rope  # for the next pass

    def test_it_is_taken_back_where_megatron_cannot(self, monkeypatch):
        usual = {
            "fused_single_qkv_rope": True,
            "rotary_interleaved": False,
            "num_query_groups": 2,
            "tensor_model_parallel_size": 2,
            "test_mode": False,
            "flash_decode": False,
            "attention_output_gate": False,
        }

        def settled(**changes) -> bool:
            config = SimpleNamespace(**usual | changes)
            settle_joined_rope(config)
            return config.fused_single_qkv_rope

        assert settled()
        assert not settled(tensor_model_parallel_size=4)
        for name in ("rotary_interleaved", "test_mode", "flash_decode", "attention_output_gate"):
            assert not settled(**{name: True})
        monkeypatch.setattr(attention, "HAVE_FUSED_QKV_ROPE", False)
        with pytest.raises(UsageError, match="add --backend-part rope=qkv"):
            settled()


def test_transformer_engine_on_the_meta_device_gets_a_message(monkeypatch):
    local = get_backend("local")
    row = dataclasses.replace(local, name="te", linear=backends.Part("TransformerEngine", local.linear.use))
    monkeypatch.setattr(backends, "BACKENDS", BACKENDS | {"te": lambda: row})
    with pytest.raises(UsageError, match=r"te cannot build on the meta device.*backend local has the same parameters"):
        model("A", backend="te", meta=True)


def test_the_linear_loss_never_makes_logits(monkeypatch):
    """Megatron's output layer, which would, is not asked; without labels it is."""
    built = model("AM", backend="composer", parts={"loss": "linear"}).eval()
    tokens = torch.arange(12)[None]
    labels, positions = tokens.roll(-1, 1), torch.zeros_like(tokens)
    logits = built(tokens, positions, None)
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    monkeypatch.setattr(megatron_layers.ColumnParallelLinear, "_forward_impl", lambda *_, weight, **__: None[weight])
    monkeypatch.setattr(built.decoder, "forward", lambda **_: torch.ones(12, 1, SHAPE.hidden_size))
    built(tokens, positions, None, labels=labels)
    monkeypatch.undo()
    torch.testing.assert_close(built(tokens, positions, None, labels=labels), wanted, rtol=1e-5, atol=1e-5)  # fp32
    assert built.post_process


class TestGradientAccumulation:
    """With Megatron's buffers, every gradient that a kernel can add is in them, and the rest comes by autograd."""

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("loss", ["composer", "linear"])
    def test_buffers_hold_the_gradients_of_two_micro_batches(self, tied, loss, monkeypatch):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu") if not cpu.has_gpu() else None
        wanted = losses_and_gradients(model("AMA", tied=tied, backend="local"))
        backend = get_backend("composer")
        backend.install()
        built = model("AMA", tied=tied, backend="composer", parts={"loss": loss})
        linears = [
            m
            for m in built.modules()
            if isinstance(m, megatron_layers.ColumnParallelLinear | megatron_layers.RowParallelLinear)
        ]
        built.config.gradient_accumulation_fusion = True
        for linear in linears:
            linear.gradient_accumulation_fusion = True
        for weight in built.parameters():
            weight.main_grad = torch.zeros_like(weight)
            weight.grad_added_to_main_grad = False
        added = set()
        for _ in range(2):
            losses_and_gradients(built)
            for name, weight in built.named_parameters():  # what the hook of distributed data parallelism does
                if weight.grad_added_to_main_grad:
                    added.add(name)
                if weight.grad is not None and (
                    not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False)
                ):
                    weight.main_grad += weight.grad
                weight.grad, weight.grad_added_to_main_grad = None, False
        for name, weight in built.named_parameters():
            value = 2 * wanted[name]
            torch.testing.assert_close(weight.main_grad, value, rtol=0, atol=3e-6 * value.abs().max().item(), msg=name)
        embedding = "embedding.word_embeddings.weight"
        assert {name for name in wanted if name not in ("loss", embedding)} <= added

    def test_installing_serves_layers_that_were_imported_before(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "fused_weight_gradient_mlp_cuda", raising=False)
        monkeypatch.setattr(megatron_layers, "_grad_accum_fusion_available", False)
        monkeypatch.setattr(megatron_layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
        wgrad.install()
        assert megatron_layers._grad_accum_fusion_available
        buffer = torch.ones(3, 2)
        megatron_layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(torch.ones(5, 2), torch.ones(5, 3), buffer)
        assert torch.equal(buffer, torch.full((3, 2), 6.0))
        assert not wgrad.apex_is_there()

    def test_apex_serves_where_it_is(self, monkeypatch):
        apex = SimpleNamespace(__file__="fused_weight_gradient_mlp_cuda.so", __name__="fused_weight_gradient_mlp_cuda")
        monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", apex)
        monkeypatch.setattr(megatron_layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
        assert wgrad.apex_is_there()
        wgrad.install()
        assert megatron_layers.fused_weight_gradient_mlp_cuda is apex

    @pytest.mark.parametrize(
        ("fused", "dtype", "expected"),
        [(True, torch.float32, True), (True, torch.bfloat16, False), (False, torch.float32, False)],
    )
    def test_only_fp32_buffers_of_the_fusion_are_offered(self, fused, dtype, expected):
        weight = torch.nn.Parameter(torch.zeros(2))
        config = SimpleNamespace(gradient_accumulation_fusion=fused)
        assert wgrad.main_grad(weight, config) is None
        weight.main_grad = torch.zeros(2, dtype=dtype)
        assert (wgrad.main_grad(weight, config) is weight.main_grad) == expected


def without(*packages: str):
    find = importlib.util.find_spec
    return lambda name, *args: None if name in packages else find(name, *args)


class TestTransformerEngine:
    def test_it_is_named_where_it_is_missing(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", without("transformer_engine"))
        with pytest.raises(ComposerError, match=r'pip install --no-build-isolation "transformer-engine\[pytorch\]"'):
            BACKENDS["te"].__wrapped__()

    def test_its_row_is_made_of_its_modules(self, monkeypatch):
        """Megatron defines them without it, too; building one would fail."""
        te = pytest.importorskip("megatron.core.extensions.transformer_engine")
        monkeypatch.setattr(backends, "require", lambda *_: None)
        monkeypatch.delenv("NVTE_FLASH_ATTN_V4", raising=False)
        row = BACKENDS["te"].__wrapped__()
        assert os.environ.pop("NVTE_FLASH_ATTN_V4") == "0"
        assert row.quantises()
        assert backend_flags(row)["--transformer-impl"] == "transformer_engine"
        spec = stack_spec(row)
        assert spec.params["final_norm"] is te.TENorm
        attention = LAYERS["A"].spec(row).submodules.self_attention.submodules
        assert attention.linear_qkv is te.TEColumnParallelLinear
        assert attention.core_attention is te.TEDotProductAttention
        assert LAYERS["M"].spec(row).submodules.mlp.keywords["submodules"].linear_fc2 is te.TERowParallelLinear


def test_composer_needs_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", without("triton"))
    with pytest.raises(ComposerError, match="backend composer needs the package triton, which is missing: pip install"):
        BACKENDS["composer"].__wrapped__()


@pytest.mark.parametrize(("gpu", "name"), [(True, "composer"), (False, "local")])
def test_the_machine_has_a_backend(gpu, name, monkeypatch):
    monkeypatch.setattr(cpu, "has_gpu", lambda: gpu)
    assert backends.default_backend() == name


def test_installing_twice_is_installing_once():
    get_backend("composer").install()
    first = rope_utils.fused_apply_rotary_pos_emb, megatron_layers.fused_weight_gradient_mlp_cuda
    get_backend("composer").install()
    assert first == (rope_utils.fused_apply_rotary_pos_emb, megatron_layers.fused_weight_gradient_mlp_cuda)


@pytest.mark.parametrize("name", ["composer", "local"])
def test_a_report_says_who_plays_every_part(name):
    line = get_backend(name, {"loss": "linear"}).report(SHAPE, torch.float32)
    assert line.startswith(f"backend {name}+loss=linear | norm: ")
    assert [part.partition(": ")[0].replace(" ", "_") for part in line.split(" | ")[1:]] == list(PARTS)
    assert all(part.partition(": ")[2] for part in line.split(" | ")[1:])
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("locl", {}, r"unknown backend 'locl': did you mean 'local'\? known: composer, local, te"),
        ("local", {"attn": "local"}, r"unknown backend part 'attn'.*known: norm, attention, linear"),
        ("local", {"norm": "linear"}, r"unknown player of norm 'linear': known: composer, local, te"),
        ("local", {"linear": "fp9"}, r"unknown player of linear 'fp9': did you mean 'fp8'\? known: .*, fp8-wgrad$"),
    ],
)
def test_what_is_unknown_is_named_with_what_there_is(name, parts, message):
    with pytest.raises(UsageError, match=message):
        get_backend(name, parts)


class TestFlags:
    """On the command line."""

    def options(self, *argv: str):
        return parse_options(["--architecture", "a.json", *argv])

    def given(self, *argv: str) -> Flags:
        return given_flags(argv)

    def test_backend_and_parts(self):
        found = self.options("--backend", "composer", "--backend-part", "loss=linear", "--backend-part", "norm=local")
        assert (found.backend, found.parts) == ("composer", {"loss": "linear", "norm": "local"})
        assert self.options("--backend-part", "gradient-accumulation=local").parts == {"gradient_accumulation": "local"}
        assert (self.options().backend, self.options().parts) == (None, {})

    @pytest.mark.parametrize("text", ["attention", "=te", "attention="])
    def test_a_part_without_a_name(self, text):
        with pytest.raises(UsageError, match="expected PART=NAME, such as attention=te"):
            self.options("--backend-part", text)

    def test_flags_of_each_backend_are_megatrons(self):
        local, composer = (backend_flags(get_backend(name)) for name in ("local", "composer"))
        assert set(local) == {"--transformer-impl", "--no-rope-fusion", "--no-gradient-accumulation-fusion"}
        assert set(composer) == {"--transformer-impl", "--use-te-activation-func", "--no-bias-swiglu-fusion"}
        for flags in (local, composer):
            given_flags([name if value is None else f"{name}={value}" for name, value in flags.items()])

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("--transformer-impl", "transformer_engine"), "--transformer-impl: needs .*transformer_engine.*--backend"),
            (
                ("--fp8-format", "hybrid"),
                "--fp8-format: needs the package transformer_engine, which is missing; .*bf16",
            ),
            (("--fp4-format", "e2m1"), "--fp4-format: needs the package transformer_engine"),
            (("--cross-entropy-fusion-impl", "te"), "use --backend-part loss=composer"),
            (("--cross-entropy-loss-fusion",), "add --backend-part loss=local"),
            (("--use-flash-attn",), "--use-flash-attn: needs the package flash_attn, which is missing; leave it out"),
            (("--fused-residual-rmsnorm",), "residual additions are fused with norms"),
            (("--tp-comm-overlap",), "--tp-comm-overlap: needs"),
            (("--cuda-graph-impl", "transformer_engine"), "use --cuda-graph-impl full_iteration"),
            (("--attention-backend", "flash"), "--backend-part attention=te"),
        ],
    )
    def test_a_flag_that_nothing_could_obey_names_the_replacement(self, argv, message, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", without("transformer_engine", "flash_attn"))
        with pytest.raises(UsageError, match=message):
            check_packages(self.given(*argv), get_backend("composer"))

    def test_fp8_needs_the_layers_as_well_as_the_package(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
        with pytest.raises(UsageError, match="add --backend te"):
            check_packages(self.given("--fp8-format", "hybrid"), get_backend("composer"))

    @pytest.mark.parametrize(
        "argv", [(), ("--transformer-impl", "local"), ("--cuda-graph-impl", "local"), ("--attention-backend", "auto")]
    )
    def test_other_flags_pass(self, argv):
        check_packages(self.given(*argv), get_backend("composer"))

    def test_megatrons_own_fused_loss_goes_with_megatrons_loss(self):
        check_packages(self.given("--cross-entropy-loss-fusion"), get_backend("composer", {"loss": "local"}))
