"""CompositeStack: Megatron-core's hybrid stack of blocks, without TransformerEngine and with three defects mended.

Parameters, their names and the checkpoint layout are those of `HybridStack`, so checkpoints go both ways.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class CompositeStack(HybridStack):
    """The blocks of one pipeline stage and, on the last stage, the final norm.

    Differs from `HybridStack` where that one

    * builds TransformerEngine's norm as the final norm, whatever the spec says: here `final_norm` is a parameter;
    * hands on its very input when a stage has no blocks: Megatron's schedules free a stage's output after sending it,
      and with it the input that backward needs (gradients were silently wrong): here it is a copy;
    * draws the same dropout mask on all tensor-parallel ranks under sequence parallelism, where each rank holds another
      part of the sequence: here the ranks draw from their own generators.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *args: Any,
        final_norm: Callable[..., nn.Module],
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        """Build the stage.

        Args:
            config: Megatron-core's configuration.
            submodules: The spec of each kind of block.
            args: As for `HybridStack`.
            final_norm: Builds the final norm, ``final_norm(config=, hidden_size=, eps=)``.
            post_layer_norm: Whether the last stage ends with the final norm.
            kwargs: As for `HybridStack`.
        """
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the blocks.

        Args:
            args: As for `HybridStack`: hidden states (s, b, h) first, with s the rank's share of the sequence under
                sequence parallelism.
            kwargs: As for `HybridStack`.

        Returns:
            Hidden states of the same shape.
        """
        with self._random_generator():
            output = super().forward(*args, **kwargs)
        return output if len(self.layers) else output.clone()

    def _random_generator(self) -> AbstractContextManager[None]:
        return get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext()
