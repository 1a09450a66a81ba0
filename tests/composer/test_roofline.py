"""Predicted times: how far from measured throughputs, and how they answer to sizes."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.layout import Layout
from composer_megatron.pipeline import plan
from composer_megatron.planner.estimate import estimate
from composer_megatron.roofline import DEVICES, get_device, predict, ring_seconds, transfer_seconds
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS, Shape

RESULTS = Path(__file__).parents[2] / "benchmarks/results/nvidia-h200"


class Anchor(NamedTuple):
    """A measured throughput: tokens/s a GPU."""

    source: str
    architecture: Architecture
    layout: Layout
    device: str
    tokens_per_second: float


def llama_like(name: str, widths: tuple[int, ...], pairs: int, *, tied: bool) -> Architecture:
    hidden, ffn, heads, vocab = widths
    shape = Shape(
        name=name,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        tied_embeddings=tied,
        baseline_pairs=pairs,
    )
    return Architecture(CompositeSequence("AM" * pairs), shape)


def preset(name: str) -> Architecture:
    return Architecture(CompositeSequence("AM" * PRESETS[name].baseline_pairs), PRESETS[name])


def our_anchors() -> list[Anchor]:
    """Our own, with plain PyTorch modules, one H200."""
    anchors = []
    for path in sorted(RESULTS.glob("training-*.json")):
        found = json.loads(path.read_text())
        layout = Layout(micro_batch_size=found["batch"], micro_batches=1, seq_len=found["seq_len"])
        for name, row in found["models"].items():
            architecture = Architecture(CompositeSequence.parse(row["sequence"]), Shape.from_dict(found["shape"]))
            anchors.append(Anchor(f"{path.stem} {name}", architecture, layout, "h200", row["tokens_per_second"]))
    return anchors


def published(source: str, architecture: Architecture, sizes: tuple[int, int, int], tokens: float) -> Anchor:
    seq_len, micro_batch, gpus = sizes
    layout = Layout(
        seq_len=seq_len, micro_batch_size=micro_batch, micro_batches=1, data_parallel=gpus, distributed_optimizer=True
    )
    return Anchor(source, architecture, layout, "h100", tokens)


# GPT-like MLPs of 4 x hidden without a gate count as gated ones of 8/3: equal weights and products.
PUBLISHED = [
    published("marin#1826, quoting nanotron's 1B on 8 H100", preset("1b"), (4096, 2, 8), 42_000),
    published("torchtitan llama3_h100_202412, 8B compiled", preset("8b"), (8192, 2, 8), 6_667),
    published(
        "llm.c run_gpt2_1558M.sh", llama_like("gpt2", (1600, 4267, 25, 50304), 48, tied=True), (1024, 16, 8), 46_811
    ),
    published(
        "fms-fsdp README, Llama 2 7B", llama_like("7b", (4096, 11008, 32, 32000), 32, tied=False), (4096, 2, 96), 9_600
    ),
    published("LLM Foundry MPT-1b", llama_like("mpt1", (2048, 5461, 16, 50368), 24, tied=True), (2048, 14, 8), 45_455),
    published("LLM Foundry MPT-1b", llama_like("mpt1", (2048, 5461, 16, 50368), 24, tied=True), (8192, 3, 8), 29_157),
    published("LLM Foundry MPT-3b", llama_like("mpt3", (2560, 6827, 20, 50368), 32, tied=True), (4096, 5, 8), 20_964),
    published("LLM Foundry MPT-7b", llama_like("mpt7", (4096, 10923, 32, 50368), 32, tied=True), (2048, 6, 8), 10_643),
]


def predicted(anchor: Anchor) -> float:
    """Tokens/s a GPU; of many micro-batches, where communication and optimizer count little, for those on many GPUs."""
    seconds = estimate(plan(anchor.architecture, anchor.layout, device=DEVICES[anchor.device])).seconds
    return anchor.layout.tokens / seconds


@pytest.mark.parametrize("anchor", [*our_anchors(), *PUBLISHED], ids=lambda anchor: anchor.source)
def test_each_measured_throughput_is_within_a_quarter(anchor: Anchor) -> None:
    assert 1 / 1.25 < predicted(anchor) / anchor.tokens_per_second < 1.25


def test_predictions_are_right_in_the_mean() -> None:
    errors = [math.log(predicted(anchor) / anchor.tokens_per_second) for anchor in (*our_anchors(), *PUBLISHED)]
    assert len(errors) == 14
    assert abs(sum(errors) / len(errors)) < math.log(1.05)


def test_a_composite_gains_over_its_baseline_as_measured() -> None:
    """Predicted and measured speed-ups agree within five hundredths: what planning for Composites needs."""
    anchors = our_anchors()
    for composite, baseline in zip(anchors[::2], anchors[1::2], strict=True):
        measured = composite.tokens_per_second / baseline.tokens_per_second
        assert predicted(composite) / predicted(baseline) == pytest.approx(measured, abs=0.05)


def test_work_is_shared() -> None:
    architecture = preset("8b")
    one = predict(architecture, Layout(), DEVICES["h100"])
    four = predict(architecture, Layout(tensor_parallel=4, sequence_parallel=True), DEVICES["h100"])
    longer = predict(architecture, Layout(seq_len=8192), DEVICES["h100"])
    for letter in "AM":
        assert one.blocks[letter].forward / 4 < four.blocks[letter].forward < one.blocks[letter].forward
        assert one.blocks[letter].backward > 2 * one.blocks[letter].forward * 0.9
    assert longer.blocks["M"].forward == pytest.approx(2 * one.blocks["M"].forward)
    assert longer.blocks["A"].forward > 2.1 * one.blocks["A"].forward  # attention grows with the square
    assert one.predicted


def test_recomputation_costs_its_forward_pass() -> None:
    architecture = preset("8b")
    none, selective, full = (
        predict(architecture, Layout(recompute=each), DEVICES["h100"]).blocks for each in ("none", "selective", "full")
    )
    for letter in "AM":
        assert full[letter].backward == pytest.approx(none[letter].backward + none[letter].forward)
    assert selective["M"] == none["M"]
    assert none["A"].backward < selective["A"].backward < full["A"].backward


def test_links() -> None:
    h100, architecture = DEVICES["h100"], preset("8b")
    assert h100.link(8) == pytest.approx(0.8 * 450e9)
    assert h100.link(9) == pytest.approx(0.8 * 50e9)
    assert ring_seconds(100.0, 4, 10.0) == 7.5
    assert ring_seconds(100.0, 1, 10.0) == 0.0
    inside = Layout(pipeline_parallel=4)
    assert transfer_seconds(architecture, inside, h100) == pytest.approx(2 * 4096 * 4096 / h100.link(8))
    across = Layout(pipeline_parallel=4, data_parallel=8)
    assert transfer_seconds(architecture, across, h100) == pytest.approx(2 * 4096 * 4096 / h100.link(9))
    assert transfer_seconds(architecture, Layout(), h100) == 0.0


def test_context_parallel_communication_hides_behind_long_attention() -> None:
    architecture = preset("8b")
    far = Layout(context_parallel=16, seq_len=1_048_576)
    near = Layout(context_parallel=16, seq_len=4096)
    for layout, hidden in ((far, True), (near, False)):
        alone = Layout(seq_len=layout.seq_len)
        ratio = [predict(architecture, each, DEVICES["h100"]).blocks["A"].forward for each in (alone, layout)]
        assert (ratio[1] * 16 < 1.01 * ratio[0]) is hidden


@pytest.mark.parametrize(
    ("name", "message"), [("h10", "did you mean 'h100'"), ("cpu", "profile"), ("tpu", "known: h100")]
)
def test_unknown_devices(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_device(name)
