"""Mamba-2 and Gated DeltaNet by their packages' kernels against our PyTorch, on a GPU."""

import dataclasses
import importlib.util

import pytest
import torch

from composer_megatron.architecture import Architecture
from composer_megatron.model import build_model
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

pytestmark = pytest.mark.gpu
SHAPE = dataclasses.replace(PRESETS["60m"], vocab_size=512, tied_embeddings=False)
IN_BF16 = 0.05
"""Relative to the largest: two sums of some hundred products each in bf16 (epsilon 0.008), in another order."""
NEEDS = {"S": ("mamba_ssm", "causal_conv1d", "einops"), "G": ("fla",)}


def losses_and_gradients(letter, player):
    model = build_model(
        Architecture(CompositeSequence(letter + "M"), SHAPE),
        max_sequence_length=256,
        dtype=torch.bfloat16,
        backend="composer",
        parts={"recurrence": player},
    ).train()
    tokens = torch.randint(512, (2, 256), generator=torch.Generator().manual_seed(0)).cuda()
    losses = model(tokens, torch.arange(256, device="cuda").expand(2, -1), None, labels=tokens.roll(-1, 1))
    losses.float().mean().backward()
    gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    return losses.float().detach(), gradients


@pytest.mark.parametrize("letter", list(NEEDS))
def test_kernels_compute_what_pytorch_does(letter):
    missing = [name for name in NEEDS[letter] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    (losses, gradients), (wanted, expected) = (losses_and_gradients(letter, each) for each in ("composer", "local"))
    assert (losses - wanted).abs().max() <= IN_BF16 * wanted.abs().max()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= IN_BF16 * expected[name].abs().max(), name
