"""Training on raw text: sequences are tokenized while they are needed, and a checkpoint knows where the text stands.

The text is dealt to as many streams as there were data-parallel ranks at the start (``--text-shards`` for another
number); each rank has its share of them. A global batch holds as many sequences of each stream, so the numbers are the
same on any number of ranks that divides the streams. The place of every stream is saved within the checkpoint, with
Megatron's own arguments, and so is what tells whether the files are still the same.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.training import get_args

from composer_megatron.data import Batch, packs_documents, reads_data, report_sources
from composer_megatron.errors import FileError, UsageError
from composer_megatron.raw import RawMixture
from composer_megatron.text.packing import Blend, Packing, Sample, held_out_samples

_STATE = "text_stream"
"""The name of a run's place in its text among Megatron's arguments, with which a checkpoint keeps it."""


class StreamedText:
    """The data of a run on raw text, in the place of Megatron's data sets."""

    def __init__(self, text: RawMixture) -> None:
        """Nothing is read before `datasets`."""
        self.text = text
        self._batches: list[TrainingBatches] = []
        self._saved: Mapping[str, Any] | None = None

    def datasets(self, num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list[Any]:
        """Batches to train and to evaluate on, on the stages that read data; as `data.train_valid_test_datasets`.

        Raises:
            UsageError: If the flags do not fit a stream.
            FileError: If the text is not that of the checkpoint, or too little.
        """
        args = get_args()
        shards = self._shards(args)
        if not reads_data(args, vp_stage):
            return [None, None, None]
        packing = Packing(self.text.tokenizer, self.text.end_of_text, args.seq_length, max(1, args.num_workers))
        batches = TrainingBatches(self.text, packing, args, shards, self._saved)
        self._batches.append(batches)
        valid = None
        if num_samples[1]:
            number = args.eval_iters * args.eval_global_batch_size
            samples = held_out_samples(self.text.texts, self.text.weights, packing, number)
            report_sources(args, [sample.source for sample in samples])
            valid = evaluation_batches(samples, args)
        return [batches, valid, None]

    datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron: to be called on every rank

    def _shards(self, args: Namespace) -> int:
        ranks = parallel_state.get_data_parallel_world_size()
        shards = self._saved["shards"] if self._saved else self.text.shards or ranks
        if shards % ranks:
            problem = f"the text is dealt to {shards} streams, which {ranks} data-parallel ranks cannot share equally"
            raise UsageError(f"{problem}; use a number of ranks that divides {shards}")
        if args.global_batch_size % shards:
            problem = f"--global-batch-size {args.global_batch_size} has no equal part of each of {shards} streams"
            raise UsageError(f"{problem}; use a multiple of {shards}")
        return int(shards)

    def saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's ``save_checkpoint``, which saves the places of all streams, too."""

        def call(*positional: Any, **named: Any) -> Any:
            own: dict[int, Any] = {}
            for batches in self._batches:
                own |= batches.states
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, own)
            streams = dict(sorted(itertools.chain.from_iterable(states.items() for states in everyones)))
            state = {"shards": len(streams), "text": self.text.checksums, "streams": streams}
            setattr(get_args(), _STATE, state)
            return save(*positional, **named)

        return call

    def loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's ``load_checkpoint``, which finds the places of all streams, too.

        Raises:
            FileError: If the checkpoint has none, or they are of another text.
        """

        def call(*positional: Any, **named: Any) -> Any:
            result = load(*positional, **named)
            if result[0]:
                self._saved = _saved_state(Path(get_args().load) / f"iter_{result[0]:07d}")
                self.text.check_same(self._saved["text"])
            return result

        return call


def _saved_state(checkpoint: Path) -> Mapping[str, Any]:
    from megatron.core.dist_checkpointing import load_common_state_dict

    state = getattr(load_common_state_dict(str(checkpoint)).get("args"), _STATE, None)
    if state is None:
        advice = "give the text folder that it was trained on, or begin with its weights alone: --finetune"
        raise FileError(f"{checkpoint} was not trained on raw text, so it does not say where to go on in it; {advice}")
    return state


class TrainingBatches(Iterator[Batch]):
    """The micro-batches of this data-parallel rank, without end."""

    def __init__(
        self, text: RawMixture, packing: Packing, args: Namespace, shards: int, saved: Mapping[str, Any] | None
    ) -> None:
        """Begin, or go on.

        Args:
            text: What to read.
            packing: How documents become sequences.
            args: Megatron's.
            shards: Streams in all.
            saved: The state of all streams; None to begin.
        """
        share = shards // parallel_state.get_data_parallel_world_size()
        first = share * parallel_state.get_data_parallel_rank()
        self._args = args
        self._streams = {
            shard: Blend(
                text.texts,
                text.weights,
                packing,
                shard=shard,
                shards=shards,
                block_bytes=text.block_bytes,
                seed=args.seed,
                state=saved and saved["streams"][shard],
            )
            for shard in range(first, first + share)
        }
        self._turns = itertools.cycle(self._streams.values())

    @property
    def states(self) -> dict[int, dict[str, Any]]:
        """Where each of the rank's streams stands, behind the sequences that were given out."""
        return {shard: stream.state for shard, stream in self._streams.items()}

    def __next__(self) -> Batch:
        return as_batch([next(next(self._turns)) for _ in range(self._args.micro_batch_size)], self._args)


def evaluation_batches(samples: Sequence[Sample], args: Namespace) -> Iterator[Batch]:
    """The micro-batches of this data-parallel rank out of the same samples in each evaluation, without end."""
    size, rank = args.eval_micro_batch_size, parallel_state.get_data_parallel_rank()
    step = size * parallel_state.get_data_parallel_world_size()
    for start in itertools.cycle(range(rank * size, len(samples), step)):
        yield as_batch(samples[start : start + size], args)


def as_batch(samples: Sequence[Sample], args: Namespace) -> Batch:
    """Samples as Megatron's data sets would have them, collated; what there is beside tokens, its flags say."""
    rows = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens)
        inputs, labels = tokens[:-1].contiguous(), tokens[1:].contiguous()
        attention_mask, loss_mask, positions = _get_ltor_masks_and_position_ids(
            inputs,
            args.null_tokenizer_eod_id,
            args.reset_position_ids,
            args.reset_attention_mask,
            args.eod_mask_loss,
            args.create_attention_mask_in_dataloader,
        )
        row = {"tokens": inputs, "labels": labels, "loss_mask": loss_mask, "position_ids": positions}
        if packs_documents(args):
            ends = torch.tensor(list(itertools.accumulate(sample.documents, initial=0)), dtype=torch.int32)
            row["cu_seqlens"] = torch.nn.functional.pad(ends, (0, len(inputs) + 1 - len(ends)), value=len(inputs))
            row["max_seqlen"] = ends.diff().max()
            row["position_ids"] = torch.cat([torch.arange(length) for length in sample.documents])
        elif attention_mask is not None:
            row["attention_mask"] = attention_mask
        row["dataset_id"] = torch.tensor(sample.source)
        rows.append(row)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
