"""The data of a training run, for `megatron.training.pretrain`: its data sets, and one step over a batch.

Every tensor-parallel rank of the first and the last pipeline stage reads its batches itself: the order is a function of
the seed, the files are mapped into memory, and nothing has to be sent between ranks.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = dict[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


class RepeatedValidation(Dataset[Batch]):
    """The first `period` samples of a data set, over and over, so that every evaluation sees the same ones.

    Megatron reads on through the validation data from one evaluation to the next; then a loss may rise because the
    text got harder.
    """

    index_split = Split.valid  # tells Megatron to use the batch size of evaluations

    def __init__(self, dataset: Dataset[Batch], period: int) -> None:
        """Repeat `dataset` after each `period` samples, which it must have."""
        self.dataset, self.period = dataset, period

    def __len__(self) -> int:
        return 2**31  # as good as endless; the sampler only counts up to it

    def __getitem__(self, index: int) -> Batch:
        return self.dataset[index % self.period]


def train_valid_test_datasets(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list[Any]:
    """The three data sets of the run's flags, on the stages that read data; None elsewhere and for no data.

    Args:
        num_samples: Sequences to train on, to evaluate on in all evaluations together (None for all there are, once),
            and to test on.
        vp_stage: Virtual pipeline stage.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    train, valid, test = num_samples
    once = args.eval_iters * args.eval_global_batch_size if valid else valid
    datasets = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        [train, once, test],
        lambda: is_first_or_last_pipeline_stage(vp_stage),
        config,
    ).build()
    if once and datasets[1] is not None:
        datasets[1] = RepeatedValidation(datasets[1], once)
    return datasets


train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron: to be called on every rank


def forward_step(batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
    """Run a micro-batch through this stage.

    Args:
        batches: Where this stage reads data: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``
            (micro-batch, sequence), perhaps ``attention_mask``.
        model: This stage.

    Returns:
        The stage's output, on the last stage the loss of each token (micro-batch, sequence), and the function that
        makes a loss of that.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch: dict[str, Tensor | None] = {}
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        device = torch.cuda.current_device()
        whole = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
        context = parallel_state.get_context_parallel_group()  # without it, the group would be all ranks
        batch = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=context)
    timers("batch-generator").stop()
    output = model(
        batch.get("tokens"),
        batch.get("position_ids"),
        batch.get("attention_mask"),
        labels=batch.get("labels"),
        loss_mask=batch.get("loss_mask"),
    )
    return output, functools.partial(_loss, batch.get("loss_mask"))


def _loss(loss_mask: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over the tokens that count (all, without a mask), how many those are, and both to report.

    Megatron divides the one by the other and then takes the mean over context-parallel ranks. Where a mask leaves these
    unequal numbers of tokens, the sum is weighted so that each token still counts as much as in one process.
    """
    mask = torch.ones_like(losses) if loss_mask is None else loss_mask
    mask = mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().detach()
    report = {"lm loss": torch.stack([total.detach(), tokens])}
    if _takes_the_mean_over_context_ranks():
        everywhere = tokens.clone()
        torch.distributed.all_reduce(everywhere, group=parallel_state.get_context_parallel_group())
        ranks = parallel_state.get_context_parallel_world_size()
        total = total * (tokens * ranks / everywhere.clamp(min=1))
    return total, tokens.to(torch.int), report


def _takes_the_mean_over_context_ranks() -> bool:
    if not parallel_state.is_initialized() or parallel_state.get_context_parallel_world_size() == 1:
        return False
    return not get_args().calculate_per_token_loss  # which sums both over all ranks before it divides
