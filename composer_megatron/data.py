"""The data of a training run, for `megatron.training.pretrain`: its data sets, and one step over a batch.

Every tensor-parallel rank of the stages that read data reads its batches itself: the order is a function of the seed,
the files are mapped into memory, and nothing has to be sent between ranks. Those are the first and the last stage, and
with document masks all: each block of attention has to know where documents end.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, make_viewless_tensor
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
        **({"inter_document_masking": True} if packs_documents(args) else {}),
    )
    train, valid, test = num_samples
    once = args.eval_iters * args.eval_global_batch_size if valid else valid
    datasets = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        [train, once, test],
        lambda: reads_data(args, vp_stage),
        config,
    ).build()
    if once and datasets[1] is not None:
        if isinstance(datasets[1], BlendedDataset):
            report_sources(args, datasets[1].dataset_index[:once].tolist())
        datasets[1] = RepeatedValidation(datasets[1], once)
    return datasets


train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron: to be called on every rank


def reads_data(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this stage needs batches: Megatron's ends of the pipeline, and with document masks what lies between."""
    return bool(packs_documents(args) or args.reset_attention_mask or is_first_or_last_pipeline_stage(vp_stage))


def packs_documents(args: Namespace) -> bool:
    """Whether documents are packed sequences to attention; Megatron-core before 0.19 has no such flag."""
    return bool(getattr(args, "dataloader_inter_document_masking", False))


def report_sources(args: Namespace, held_out: list[int]) -> None:
    """Let evaluations report the loss of each source apart.

    Args:
        args: Megatron's; `text_names`, where it has any, are the names of the sources.
        held_out: The source of each sequence that is evaluated on.
    """
    names = getattr(args, "text_names", ())
    args.reported_sources = {number: names[number] for number in sorted(set(held_out)) if number < len(names)}


def forward_step(batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
    """Run a micro-batch through this stage.

    Args:
        batches: Where this stage reads data: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``
            (micro-batch, sequence), perhaps ``attention_mask``, or where documents end, ``cu_seqlens`` and
            ``max_seqlen``; of a blend ``dataset_id`` (micro-batch).
        model: This stage.

    Returns:
        The stage's output, on the last stage the loss of each token (micro-batch, sequence), and the function that
        makes a loss of that.
    """
    timers, args = get_timers(), get_args()
    timers("batch-generator", log_level=2).start()
    batch: dict[str, Tensor | None] = {}
    documents, sources, rows = None, None, 1
    if reads_data(args, get_attr_wrapped_model(model, "vp_stage")):
        whole = dict(next(batches))
        rows = len(whole["tokens"])
        sources = None if model.training else whole.pop("dataset_id", None)
        whole.pop("dataset_id", None)
        context = parallel_state.get_context_parallel_group()  # without it, the group would be all ranks
        apart = context.size() > 1  # its ranks cut every row, wherever documents end
        if "cu_seqlens" in whole:
            documents = take_documents(whole) if apart else join_rows(whole)
        device = torch.cuda.current_device()
        whole = {name: tensor.to(device, non_blocking=True) for name, tensor in whole.items()}
        batch = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=context)
    timers("batch-generator").stop()
    joined = rows > 1 and documents is not None and documents.qkv_format == "thd"
    run = functools.partial(_run_joined, model, rows) if joined else model
    output = run(
        batch.get("tokens"),
        batch.get("position_ids"),
        batch.get("attention_mask"),
        labels=batch.get("labels"),
        loss_mask=batch.get("loss_mask"),
        **({} if documents is None else {"packed_seq_params": documents}),
    )
    masks = batch.get("loss_mask")
    if sources is not None and masks is not None:
        masks = masks.reshape(rows, -1)
        return output, functools.partial(_loss_and_sources, masks, sources, getattr(args, "reported_sources", {}))
    return output, functools.partial(_loss, masks)


def join_rows(batch: Batch) -> PackedSeqParams:
    """Lay the rows of a batch end to end, in place, and say where the documents in them end.

    Args:
        batch: Tensors (b, s), which become (1, b · s); ``cu_seqlens`` (b, s + 1) with the boundaries of each row's
            documents and s for the rest, and ``max_seqlen`` (b), which are taken out.

    Returns:
        The boundaries of all documents, from 0 to b · s. A row's end is one of them.
    """
    ends = _ends(batch)
    longest = int(ends.diff().max())
    for name, tensor in batch.items():
        batch[name] = tensor.reshape(1, -1)
    return _packed("thd", ends, longest)


def take_documents(batch: Batch) -> PackedSeqParams:
    """Say where the documents in a batch end, whose rows stay apart, for `CoreAttention` under context parallelism.

    Positions run through a row: only their differences matter to rotary embeddings.

    Args:
        batch: As for `join_rows`, without the change of shapes.
    """
    ends = _ends(batch)
    return _packed("bshd", ends, batch["tokens"].shape[1])


def _ends(batch: Batch) -> Tensor:
    boundaries = batch.pop("cu_seqlens").long()
    del batch["max_seqlen"]
    rows, length = batch["tokens"].shape
    return (boundaries + length * torch.arange(rows)[:, None]).unique()


def _packed(form: str, ends: Tensor, longest: int) -> PackedSeqParams:
    ends = ends.int().to(torch.cuda.current_device())
    return PackedSeqParams(
        qkv_format=form, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _run_joined(model: nn.Module, rows: int, *inputs: Any, **more: Any) -> Tensor:
    """Run a stage on rows laid end to end; what it receives and sends has the shape that the schedule knows."""
    decoder = get_attr_wrapped_model(model, "decoder")
    if not decoder.pre_process:
        received = decoder.input_tensor  # (s, b, h) in shape, and rows end to end in memory
        decoder.set_input_tensor(received.reshape(-1, 1, received.shape[-1]))
    output = model(*inputs, **more)
    if decoder.post_process:
        return output
    sent = output.reshape(-1, rows, output.shape[-1])
    return make_viewless_tensor(sent, requires_grad=sent.requires_grad, keep_graph=True)  # the schedule frees it


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


def _loss_and_sources(
    loss_mask: Tensor, sources: Tensor, names: dict[int, str], losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`_loss`, which reports the loss of each source, too.

    Args:
        loss_mask: (micro-batch, sequence).
        sources: The source of each row (micro-batch).
        names: Of the sources to report.
        losses: Of each token, in any shape of as many elements.
    """
    total, tokens, report = _loss(loss_mask, losses)
    losses = losses.detach().reshape(loss_mask.shape).float() * loss_mask
    for number, name in names.items():
        rows = (sources == number).to(losses.device)
        report[f"lm loss {name}"] = torch.stack([losses[rows].sum(), loss_mask[rows].float().sum()])
    return total, tokens, report


def _takes_the_mean_over_context_ranks() -> bool:
    if not parallel_state.is_initialized() or parallel_state.get_context_parallel_world_size() == 1:
        return False
    return not get_args().calculate_per_token_loss  # which sums both over all ranks before it divides
