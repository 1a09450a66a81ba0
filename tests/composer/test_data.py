"""Validation that repeats, and the loss of a micro-batch."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from composer_megatron.data import (
    RepeatedValidation,
    _loss,
    _loss_and_sources,
    report_sources,
    train_valid_test_datasets,
)

torch.set_num_threads(1)


class Numbers(Dataset):
    def __getitem__(self, index):
        return {"tokens": torch.tensor(index)}


@given(period=st.integers(1, 50), evaluations=st.integers(1, 4))
def test_every_evaluation_sees_the_same_samples(period, evaluations):
    dataset = RepeatedValidation(Numbers(), period)
    seen = [int(dataset[index]["tokens"]) for index in range(period * evaluations)]
    assert seen == list(range(period)) * evaluations
    assert len(dataset) > 10**9  # Megatron's sampler counts up to it and must never come to the end
    assert dataset.index_split is Split.valid


@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_is_a_sum_over_the_tokens_that_count(masked):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]], dtype=torch.float32) if masked else None
    total, tokens, report = _loss(mask, losses.float().requires_grad_())
    wanted = losses[mask.bool()] if masked else losses
    torch.testing.assert_close(total.double(), wanted.sum(), rtol=1e-6, atol=0)  # a sum of ten numbers in fp32
    assert tokens.item() == wanted.numel()
    assert total.requires_grad
    assert not tokens.is_floating_point()
    torch.testing.assert_close(report["lm loss"][0] / report["lm loss"][1], wanted.mean().float())
    assert not report["lm loss"].requires_grad


def test_megatron_calls_the_provider_on_every_rank():
    assert train_valid_test_datasets.is_distributed is True


def test_the_loss_of_each_source_apart():
    losses = torch.arange(12.0).reshape(3, 4)
    mask = torch.ones(3, 4)
    mask[1, 2:] = 0
    names = {0: "news", 2: "code"}
    total, tokens, report = _loss_and_sources(mask, torch.tensor([2, 0, 2]), names, losses.reshape(1, 12))
    assert (total, tokens) == (6 + 9 + 38, 10)
    assert {name: values.tolist() for name, values in report.items()} == {
        "lm loss": [53, 10],
        "lm loss news": [9, 2],
        "lm loss code": [44, 8],
    }
    args = Namespace(text_names=("news", "books", "code"))
    report_sources(args, [2, 0, 0, 2])
    assert args.reported_sources == names  # one without a sequence would have the loss 0 / 0
    args = Namespace()
    report_sources(args, [1, 0])
    assert args.reported_sources == {}
