"""The language-model loss by `composer_kernels`, with the vocabulary split over the tensor-parallel group.

Either from logits, or straight from hidden states and the output layer's weight, a chunk of tokens at a time, so that
the logits never lie in memory as a whole.
"""

from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor

from composer_kernels.cross_entropy import cross_entropy
from composer_kernels.linear_cross_entropy import linear_cross_entropy
from composer_megatron.layers.wgrad import main_grad


def loss_of_logits(logits: Tensor, labels: Tensor, layer: ColumnParallelLinear) -> Tensor:
    """The loss of each token from its logits, which backward overwrites.

    Args:
        logits: (s, b, v), the rank's part of the vocabulary.
        labels: (b, s), in the whole vocabulary.
        layer: The output layer, which knows its group.

    Returns:
        (b, s) in fp32 (float64 for float64 logits).
    """
    losses = cross_entropy(logits, labels.t(), group=layer.tp_group, reduction="none", inplace=True)
    return losses.t().contiguous()


class LossOutputLayer(ColumnParallelLinear):
    """Megatron's output layer that, given labels, returns losses and not logits."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `ColumnParallelLinear.forward`, and with labels the loss.

        Args:
            input_: Hidden states (s, b, h), under sequence parallelism the rank's part of s.
            weight: The embedding's, where the two are tied; None for the layer's own.
            runtime_gather_output: Without labels, whether to gather the logits of all ranks.
            labels: (b, s) for all of s, or None.

        Returns:
            Logits and bias; with labels the loss of each token (b, s) in fp32, and None.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        losses = linear_cross_entropy(
            input_,
            weight,
            labels.t(),
            group=self.tp_group,
            reduction="none",
            main_grad=main_grad(weight, self.config),
            reduce_hidden_grad=not self.sequence_parallel,  # the gather's backward sums over the ranks itself
        )
        return losses.t().contiguous(), None
