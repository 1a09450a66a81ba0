"""A whole decoding step by the kernels, on a GPU or in Triton's interpreter, against the formulas that CPUs get."""

import importlib

import pytest
import torch

from composer_megatron.architecture import Architecture
from composer_megatron.inference.engine import Admission, Engine
from composer_megatron.inference.sampling import GREEDY
from composer_megatron.inference.weights import random_weights
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape

SHAPE = Shape(
    name="test",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=90,
    tied_embeddings=True,
    baseline_pairs=2,
    init_std=0.3,
    window=5,
)
OPERATIONS = ("_norm_op", "_rope_op", "decode_attention", "linear_decode", "swiglu")


@pytest.mark.parametrize("fused", [True, False])
def test_kernels_and_formulas_choose_the_same_tokens(device, fused, monkeypatch):
    """Prompts on both sides of the window; the ring goes round."""
    weights = random_weights(
        Architecture(CompositeSequence("WMAM"), SHAPE), torch.float32, torch.device(device), seed=1
    )

    def run(*, graph: bool) -> tuple[list[list[int]], torch.Tensor]:
        engine = Engine(weights, 2, 16, fused=fused, graph=graph)
        engine.admit([Admission(0, [1, 2, 3], GREEDY), Admission(1, [4, 5, 6, 7, 8, 9, 10], GREEDY)])
        for _ in range(7):
            engine.step()
        return engine.recent(7).wait().tolist(), engine._logits

    tokens, logits = run(graph=True)
    for name in OPERATIONS:
        monkeypatch.setattr(importlib.import_module(f"composer_kernels.{name}"), "runs_kernel", lambda x: False)
    wanted, wanted_logits = run(graph=False)  # the formulas wait for the GPU, which no graph can
    assert tokens == wanted
    assert len({*wanted[0], *wanted[1]}) > 5  # a sequence that could have come out wrong
    # fp32: sums of at most 48 products in another order, four blocks
    torch.testing.assert_close(logits, wanted_logits, atol=1e-4, rtol=1e-4)
