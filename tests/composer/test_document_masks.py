"""Packed documents: the loss of each is that of the document alone, on every backend and in every parallel layout."""

import dataclasses

import pytest
import torch

from composer_megatron.data import join_rows
from composer_megatron.model import build_model

from .conftest import ARCHITECTURE, SAME, TRAINED

torch.set_num_threads(1)
RECOMPUTED = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "2")
STAGES = (
    "--pipeline-model-parallel-size",
    "2",
    "--num-virtual-stages-per-pipeline-rank",
    "2",
)  # four, two in the middle
IN_MEMORY = ("--reset-attention-mask", "--eod-mask-loss", "--calculate-per-token-loss")
LENGTHS = ((7, 1, 8), (16,), (5, 11))  # of documents in rows of 16


def batch_of(lengths) -> dict:
    generator = torch.Generator().manual_seed(0)
    rows, length = len(lengths), sum(lengths[0])
    text = torch.randint(0, 300, (rows, length + 1), generator=generator)
    boundaries = torch.full((rows, length + 1), length, dtype=torch.int32)
    for row, documents in enumerate(lengths):
        boundaries[row, : len(documents) + 1] = torch.tensor((0, *documents)).cumsum(0)
    longest = torch.tensor([max(documents) for documents in lengths])
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "cu_seqlens": boundaries, "max_seqlen": longest}


@pytest.mark.parametrize("backend", ["local", "composer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["packed", "mask"])
def test_a_packed_document_has_the_loss_that_it_has_alone(backend, dtype, kind):
    model = build_model(ARCHITECTURE, max_sequence_length=16, dtype=dtype, backend=backend)
    batch = batch_of(LENGTHS)
    alone = []
    for row, documents in enumerate(LENGTHS):
        for part, labels in zip(
            batch["tokens"][row].split(documents), batch["labels"][row].split(documents), strict=True
        ):
            alone.append(model(part[None], torch.arange(len(part))[None], None, labels=labels[None])[0])
    wanted = torch.cat(alone)
    if kind == "packed":
        documents = join_rows(batch)
        assert documents.cu_seqlens_q.tolist() == [0, 7, 8, 16, 32, 37, 48] and documents.max_seqlen_q == 16
        positions = torch.arange(48)[None]
        found = model(batch["tokens"], positions, None, labels=batch["labels"], packed_seq_params=documents)
    else:
        apart = torch.stack([torch.block_diag(*(torch.ones(n, n) for n in row)) == 0 for row in LENGTHS])[:, None]
        positions = torch.arange(16).expand(3, -1)
        found = model(batch["tokens"], positions, apart, labels=batch["labels"])
    # One rounding is 6e-8 in fp32, in which the loss is given whatever the model's type; rotary angles are, too, and a
    # mask in memory does not begin them anew. In fp32 there are sums of a few hundred terms in another order.
    single = dtype is torch.float32
    torch.testing.assert_close(found.flatten(), wanted, rtol=2e-6 if single else 2e-7, atol=0)
    gradients = [
        torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True) for losses in (found, wanted)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=scale * (1e-5 if single else 1e-6))


@pytest.fixture(scope="module")
def masked(place):
    """How to start a run of a model whose attention matters, and one with document masks."""
    sharp = dataclasses.replace(TRAINED, shape=dataclasses.replace(TRAINED.shape, init_std=0.3))
    sharp.save(place.path / "sharp.json")

    def run(name, *flags, processes=1):
        # A small learning rate, so that roundings do not grow from step to step.
        common = ("--architecture", str(place.path / "sharp.json"), "--lr", "1e-4", "--train-iters", "4")
        return place.run(name, *common, *flags, processes=processes)

    whole, plain = run("masked", "--document-masks"), run("unmasked")
    assert whole.status == plain.status == 0, whole.output
    first, without = (each.scalars("grad-norm")[1] for each in (whole, plain))
    assert abs(first / without - 1) > 100 * SAME
    return run, whole


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        # Other micro-batches have other numbers of tokens that count.
        (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--micro-batch-size", "4")),
        (2, STAGES),
        (2, ("--context-parallel-size", "2", "--micro-batch-size", "4")),
        (2, ("--context-parallel-size", "2", "--backend", "composer", *RECOMPUTED)),
        (1, ("--backend", "composer", "--backend-part", "loss=linear", *RECOMPUTED)),
    ],
    ids=["tensor", "stages", "context", "context and composer", "composer"],
)
def test_every_layout_has_the_same_numbers(masked, processes, flags, request):
    run, whole = masked
    run(f"masked-{request.node.callspec.id}", "--document-masks", *flags, processes=processes).assert_same(whole)


def test_it_is_the_mask_that_megatron_keeps_in_memory(masked):
    """On a stage in the middle of the pipeline, too, which has no use for data otherwise."""
    run, whole = masked
    run("in-memory", *IN_MEMORY, *STAGES, processes=2).assert_same(whole)
