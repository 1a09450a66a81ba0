"""`composer_megatron.model.CompositeModel` for `megatron.training.pretrain`: its configuration names its builder."""

from dataclasses import dataclass
from typing import ClassVar

from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from composer_megatron.backend import Loss
from composer_megatron.errors import UsageError
from composer_megatron.model import CompositeModel


@dataclass(kw_only=True)
class CompositeModelConfig(HybridModelConfig):
    """Megatron's configuration of a hybrid model, of which `megatron.training.pretrain` makes a `CompositeModel`.

    Attributes:
        loss: See `CompositeModel`.
        embedding_rows: See `CompositeModel`.
        rope_scaling_factor: See `CompositeModel`.
    """

    builder: ClassVar[str] = "composer_megatron.builder.CompositeModelBuilder"
    loss: Loss = "megatron"
    embedding_rows: bool = False
    rope_scaling_factor: float = 1.0


class CompositeModelBuilder(HybridModelBuilder):
    """Builds the stages of a `CompositeModel`."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> CompositeModel:
        """Build one stage; arguments as for `HybridModelBuilder`.

        Raises:
            UsageError: If the configuration has no spec: Megatron's default would need TransformerEngine.
        """
        config = self._model_config
        if config.hybrid_stack_spec is None:
            raise UsageError("hybrid_stack_spec is not set; set it to composer_megatron.specs.composite_stack_spec")
        vocab_size = config.vocab_size
        if config.should_pad_vocab:
            multiple, ranks = config.make_vocab_size_divisible_by, config.transformer.tensor_model_parallel_size
            vocab_size = calculate_padded_vocab_size(vocab_size, multiple, ranks)
        return CompositeModel(
            loss=config.loss,
            embedding_rows=config.embedding_rows,
            rope_scaling_factor=config.rope_scaling_factor,
            config=config.transformer,
            hybrid_stack_spec=config.hybrid_stack_spec,
            vocab_size=vocab_size,
            max_sequence_length=config.seq_length,
            hybrid_layer_pattern=config.hybrid_layer_pattern,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            pre_process=is_pp_first_stage(pg_collection.pp) if pre_process is None else pre_process,
            post_process=is_pp_last_stage(pg_collection.pp) if post_process is None else post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
