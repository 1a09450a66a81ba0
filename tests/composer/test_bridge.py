"""The provider for Megatron-Bridge builds our model, which trains; what it cannot build is refused.

Importing Megatron-Bridge needs TransformerEngine and some thirty packages. These tests run against a record of
`HybridModelProvider` 0.6.2: the same fields with the same defaults, validation put off to `finalize`, and a `provide`
that hands the fields to Megatron-core. Where the environment variable MEGATRON_BRIDGE names a folder with
``megatron/bridge`` in it, such as an unpacked wheel, they run against the real class, too, taken out of there without
running the packages round it (which needs omegaconf alone), and the record is compared with it.
"""

import dataclasses
import functools
import importlib
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from composer_megatron import cpu

cpu.skip_compilation()

from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.bridge import composite_provider, model_fields  # noqa: E402
from composer_megatron.errors import ComposerError, UsageError  # noqa: E402
from composer_megatron.gpt_spec import block_spec  # noqa: E402
from composer_megatron.model import build_model, end_single_process, initialize_single_process  # noqa: E402
from composer_megatron.pattern import hybrid_pattern  # noqa: E402
from composer_megatron.pipeline import cut_sequence  # noqa: E402
from composer_megatron.sequence import CompositeSequence  # noqa: E402
from composer_megatron.shape import PRESETS  # noqa: E402
from composer_megatron.stack import CompositeStack  # noqa: E402

torch.set_num_threads(1)

PROVIDER_MODULE = "megatron.bridge.models.hybrid.hybrid_provider"
PACKAGES = ("", "models", "models.common", "models.conversion", "models.hybrid", "peft", "training", "training.utils")


@dataclasses.dataclass
class HybridModelProvider(TransformerConfig):
    """The record of 0.6.2."""

    fp16_lm_cross_entropy: bool = False
    parallel_output: bool = True
    share_embeddings_and_output_weights: bool = False
    params_dtype: torch.dtype = torch.bfloat16
    fp16: bool = False
    bf16: bool = True
    num_layers: int | None = None
    mamba_num_groups: int = 8
    mamba_chunk_size: int = 128
    num_attention_heads: int = 1
    hybrid_attention_ratio: float = 0.0
    hybrid_mlp_ratio: float = 0.0
    hybrid_override_pattern: str | None = None
    hybrid_layer_pattern: str | None = None
    seq_length: int = 8192
    position_embedding_type: str = "none"
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    seq_len_interpolation_factor: float | None = None
    apply_rope_fusion: bool = True
    make_vocab_size_divisible_by: int = 128
    gated_linear_unit: bool = False
    normalization: str = "RMSNorm"
    add_bias_linear: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    attention_backend: AttnBackend = AttnBackend.flash
    deallocate_pipeline_outputs: bool = True
    bias_dropout_fusion: bool = True
    cross_entropy_loss_fusion: bool = True
    gradient_accumulation_fusion: bool = dataclasses.field(default_factory=bool)
    hybrid_stack_spec: Any = None
    vocab_size: int | None = None
    should_pad_vocab: bool = False
    hf_model_id: str | None = None
    hf_model_revision: str | None = None
    _pg_collection: Any = None
    mtp_num_layers: int | None = 0
    mtp_hybrid_override_pattern: str | None = None
    keep_mtp_spec_in_bf16: bool = False
    restore_modelopt_state: bool = False

    def __post_init__(self) -> None:
        """Put off to `finalize`, so that fields can be changed before."""

    def finalize(self) -> None:
        layers = get_hybrid_total_layer_count(self.hybrid_layer_pattern)
        assert self.num_layers in (None, layers)
        self.num_layers = layers
        super().__post_init__()

    def provide(self, pre_process=None, post_process=None, vp_stage=None) -> HybridModel:
        assert vp_stage is None
        spec = self.hybrid_stack_spec
        if not hasattr(spec, "submodules"):
            spec = spec(self) if inspect.signature(spec).parameters else spec()
        groups, self._pg_collection = self._pg_collection, None  # layers copy the configuration, deeply
        try:
            return HybridModel(
                config=self,
                hybrid_stack_spec=spec,
                vocab_size=self.vocab_size,
                max_sequence_length=self.seq_length,
                hybrid_layer_pattern=self.hybrid_layer_pattern,
                share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                position_embedding_type=self.position_embedding_type,
                rotary_percent=self.rotary_percent,
                rotary_base=self.rotary_base,
                pre_process=is_pp_first_stage(groups.pp) if pre_process is None else pre_process,
                post_process=is_pp_last_stage(groups.pp) if post_process is None else post_process,
                pg_collection=groups,
            )
        finally:
            self._pg_collection = groups


def recorded_provider() -> type:
    """Put the record where Bridge has the real one."""
    parts = PROVIDER_MODULE.split(".")
    for length in range(2, len(parts)):
        package = ModuleType(".".join(parts[:length]))
        package.__path__ = []
        sys.modules[package.__name__] = package
    module = ModuleType(PROVIDER_MODULE)
    module.HybridModelProvider = HybridModelProvider
    sys.modules[PROVIDER_MODULE] = module
    return HybridModelProvider


def provider_of_the_wheel(folder: Path) -> type:
    """The real class; `folder` is an unpacked wheel, or any folder with ``megatron/bridge`` in it."""
    for name in (*PACKAGES, "utils"):
        package = ModuleType(".".join(part for part in ("megatron.bridge", name) if part))
        package.__path__ = [str(folder.joinpath("megatron", "bridge", *name.split(".")))]
        sys.modules[package.__name__] = package
    return importlib.import_module(PROVIDER_MODULE).HybridModelProvider


BRIDGE = os.environ.get("MEGATRON_BRIDGE")
SHAPE = dataclasses.replace(
    PRESETS["tiny"], hidden_size=32, ffn_hidden_size=48, head_dim=8, num_query_groups=2, vocab_size=64, init_std=0.1
)
ARCHITECTURE = Architecture(CompositeSequence.parse("1M2A3M"), SHAPE)
PLAIN = {"seq_length": 16, "params_dtype": torch.float32, "bf16": False}
needs_bridge = pytest.mark.skipif(not BRIDGE, reason="MEGATRON_BRIDGE names no folder with megatron/bridge in it")


@pytest.fixture(autouse=True)
def no_bridge():
    """Take out what a test has put in its place."""
    yield
    for name in [name for name in sys.modules if name.startswith("megatron.bridge")]:
        del sys.modules[name]


@pytest.fixture(params=["recorded", pytest.param("real", marks=needs_bridge)])
def provider_class(request) -> type:
    return recorded_provider() if request.param == "recorded" else provider_of_the_wheel(Path(BRIDGE or ""))


@pytest.fixture(autouse=True)
def group_of_one():
    initialize_single_process()
    yield
    end_single_process()


def provided(provider) -> torch.nn.Module:
    """The model, as Bridge's `provide_distributed_model` has it made."""
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    provider.finalize()
    return provider.provide()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], torch.arange(16).expand(2, -1), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("backend", [None, "composer"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_ours_and_trains(provider_class, backend, tied):
    architecture = dataclasses.replace(ARCHITECTURE, shape=dataclasses.replace(SHAPE, tied_embeddings=tied))
    # Without Megatron's data parallelism there is no buffer to add gradients to.
    provider = composite_provider(architecture, backend=backend, gradient_accumulation_fusion=False, **PLAIN)
    assert isinstance(provider, provider_class)
    model = provided(provider)
    assert isinstance(model.decoder, CompositeStack)
    assert sum(parameter.numel() for parameter in model.parameters()) == architecture.params_total
    ours = build_model(architecture, max_sequence_length=16)
    ours.load_state_dict(model.state_dict())
    tokens, positions, labels = batch()
    with torch.no_grad():
        found, wanted = model(tokens, positions, None), ours(tokens, positions, None)
    torch.testing.assert_close(found, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(tokens, positions, None, labels=labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def test_every_width_is_set(provider_class):
    provider = composite_provider(ARCHITECTURE, seq_length=16, tensor_model_parallel_size=2, init_method_std=0.5)
    wanted = {
        "hybrid_layer_pattern": "-**---",
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 64,
        "should_pad_vocab": False,
        "share_embeddings_and_output_weights": True,
        "rotary_base": 500_000,
        "layernorm_epsilon": 1e-5,
        "position_embedding_type": "rope",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "is_hybrid_model": True,
        "seq_length": 16,
        "tensor_model_parallel_size": 2,
        "init_method_std": 0.5,
        "bf16": True,
    }
    assert {name: getattr(provider, name) for name in wanted} == wanted
    assert isinstance(provider, provider_class)


@pytest.mark.usefixtures("provider_class")
def test_the_pattern_is_cut_for_the_pipeline():
    provider = composite_provider(ARCHITECTURE, seq_length=16, pipeline_model_parallel_size=2)
    cut = cut_sequence(ARCHITECTURE, 2, seq_len=16)
    assert provider.hybrid_layer_pattern == hybrid_pattern(ARCHITECTURE.sequence, cut)
    assert provider.hybrid_layer_pattern.count("|") == 1


@pytest.mark.usefixtures("provider_class")
def test_what_further_primitives_need_is_set_or_refused():
    def provider(letters: str) -> HybridModelProvider:
        return composite_provider(dataclasses.replace(ARCHITECTURE, sequence=CompositeSequence(letters)))

    assert provider("WMAM").window_size == (SHAPE.window - 1, 0)
    assert provider("WMAM").window_attn_skip_freq == [1, 0, 0, 0]
    assert provider("EA").num_moe_experts == SHAPE.expert_widths.num_experts
    with pytest.raises(UsageError, match="1L1M needs q_lora_rank, which HybridModelProvider does not have"):
        provider("LM")
    scaled = dataclasses.replace(ARCHITECTURE, shape=dataclasses.replace(SHAPE, rope_scaling_factor=32.0))
    with pytest.raises(UsageError, match="needs rope_scaling, which HybridModelProvider does not have; use composer_m"):
        composite_provider(scaled)


@pytest.mark.usefixtures("provider_class")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size=64 is another model than the architecture's \(32\)"),
        ({"hybrid_layer_pattern": "*-"}, r"hybrid_layer_pattern='\*-' is another model"),
        ({"virtual_pipeline_model_parallel_size": 2}, "has no interleaved schedule"),
        ({"seq_lenght": 16}, r"unknown field 'seq_lenght' of HybridModelProvider; did you mean 'seq_length'\?"),
        ({"backend": "lokal"}, "unknown backend 'lokal'"),
        ({"pipeline_model_parallel_size": 9}, "9 pipeline"),
    ],
)
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        composite_provider(ARCHITECTURE, **overrides)


def test_without_bridge_the_answer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    with pytest.raises(ComposerError, match="Megatron-Bridge is not installed: pip install megatron-bridge"):
        composite_provider(ARCHITECTURE)


def test_a_bridge_that_lacks_a_package_says_which(monkeypatch, tmp_path):
    folder = tmp_path / "megatron/bridge/models/hybrid"
    folder.mkdir(parents=True)
    (folder / "hybrid_provider.py").write_text("import transformer_engine_of_another_machine")
    package = ModuleType("megatron.bridge")
    package.__path__ = [str(tmp_path / "megatron/bridge")]
    monkeypatch.setitem(sys.modules, "megatron.bridge", package)
    with pytest.raises(ComposerError, match="cannot be imported without transformer_engine_of_another_machine"):
        composite_provider(ARCHITECTURE)


@needs_bridge
def test_the_other_provider_of_bridges_takes_our_layers():
    provider_of_the_wheel(Path(BRIDGE or ""))
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    fields = model_fields(ARCHITECTURE, "local") | PLAIN
    for name in ("hybrid_stack_spec", "is_hybrid_model"):
        del fields[name]
    provider = GPTModelProvider(
        transformer_layer_spec=functools.partial(block_spec, ARCHITECTURE),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        attention_backend=AttnBackend.auto,
        **fields,
    )
    model = provided(provider)
    ours = build_model(ARCHITECTURE, max_sequence_length=16)
    weights = {name.replace("final_layernorm", "final_norm"): value for name, value in model.named_parameters()}
    ours.load_state_dict(weights, strict=False)
    tokens, positions, _ = batch()
    with torch.no_grad():
        found, wanted = model(tokens, positions, None), ours(tokens, positions, None)
    torch.testing.assert_close(found, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=0)


@needs_bridge
def test_the_record_has_the_fields_of_the_real_provider():
    real = provider_of_the_wheel(Path(BRIDGE or ""))
    fields = [
        {field.name: field.default for field in dataclasses.fields(provider)}
        for provider in (real, HybridModelProvider)
    ]
    assert fields[0] == fields[1]
