"""The gain carried from one sequence length to others."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.bench.lengths import Gain, TokenTime, at_ceilings, gains

SOURCE = SimpleNamespace(gpu="NVIDIA H100")


def row(model: str, seq_len: int, attention: float, rest: float, **changes) -> dict:
    """A step of 2 x 2 sequences whose tokens take so many seconds."""
    tokens = 4 * seq_len
    values = {"shape": "1b", "model": model, "backend": "composer", "seq_len": seq_len, "source": SOURCE}
    values |= {"micro_batch": 2, "micro_batches": 2, "tokens_per_second": 1 / (attention + rest)}
    values |= {"breakdown": {"gemm": 0.9 * rest * tokens, "attention": attention * tokens}}
    return values | {"ideal": {"gemm": rest * tokens, "attention": attention * tokens / 2}} | changes


def test_parts_at_one_length_say_the_gain_at_others() -> None:
    """By hand: with Llama at 2 + 1 and the Composite at 2.1 + 0.5, eight times the length is 2 + 8 over 2.1 + 4."""
    rows = [row("llama", 4095, 1.0, 2.0), row("stacked", 4095, 0.5, 2.1)]
    (gain,) = gains(rows)
    assert gain.name == "1b stacked, composer, NVIDIA H100"
    assert gain.at(4095) == pytest.approx(3.0 / 2.6)
    assert gain.at(8 * 4096 - 1) == pytest.approx(10.0 / 6.1)
    assert gain.limit == pytest.approx(2.0)
    assert gain.length_of(2.0) is None
    assert gain.length_of(0.5) == 1.0
    # 2 + s = 1.25 · (2.1 + 0.5 s) where s is the length over 4096: s = 0.625 / 0.375.
    assert gain.length_of(1.25) == pytest.approx(4096 * 0.625 / 0.375 - 1)
    assert "33% of Llama's time and 19% of the Composite's at 4,095 tokens. By the steps" in gain.says()
    assert "measured at 4,095 tokens x1.25 is reached from 6,826 tokens on, and x2.00 is the limit" in gain.says()
    assert "x2.50 is reached at no length" in gain.says(2.5)
    assert at_ceilings(rows[1], rows) == pytest.approx(2.5 / 2.35)


def test_several_lengths_give_a_line() -> None:
    """Attention of 0.25 + 1 at one length and 0.25 + 4 at four times it, with rests of 2 and 1.8."""
    rows = [
        *(row("llama", 4095, 1.25, 2.0), row("stacked", 4095, 0.6, 2.0)),
        *(row("llama", 16_383, 4.25, 1.8), row("stacked", 16_383, 2.1, 2.0)),
    ]
    (gain,) = gains(rows)
    assert gain.lengths == (4095, 16_383)
    assert gain.llama.rest == pytest.approx(1.9)
    assert gain.llama.fixed == pytest.approx(0.25)
    assert gain.llama.attention(8191) == pytest.approx(2.25)
    assert gain.at(8191) == pytest.approx((1.9 + 2.25) / (2.0 + 0.1 + 1.0))
    assert gain.limit == pytest.approx(2.0)
    assert "measured at 4,095 and 16,383 tokens" in gain.says()


@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.floats(1e-3, 10), st.floats(0, 1), st.floats(0.5, 3))
def test_the_length_of_a_gain_has_that_gain(llama_slope, composite_slope, rest, fixed, wanted) -> None:
    times = TokenTime(1.0, fixed, llama_slope / 4096), TokenTime(rest, 0.0, composite_slope / 4096)
    gain = Gain("1b", "x", "y", "z", (4096,), *times)
    length = gain.length_of(wanted)
    if length is None:
        assert gain.limit <= wanted * (1 + 1e-9)
    elif length > 1:
        assert gain.at(length) == pytest.approx(wanted, rel=1e-6)
    else:
        assert gain.at(1.0) >= wanted * (1 - 1e-6)


def test_only_what_was_measured_together_is_compared() -> None:
    other = SimpleNamespace(gpu="NVIDIA H200")
    rows = [
        row("llama", 8192, 2.0, 2.0),
        row("stacked", 8192, 1.0, 2.0),
        row("llama", 4096, 1.0, 2.0, breakdown={}),  # not profiled
        row("stacked", 4096, 0.5, 2.0),
        row("stacked", 4096, 0.5, 2.0, backend="te"),
        row("stacked", 4096, 0.5, 2.0, source=other),
        row("stacked", 2048, 0.5, 2.0, tokens_per_second=None),
    ]
    (gain,) = gains(rows)
    assert gain.lengths == (8192,)
    assert at_ceilings(rows[4], rows) is None
    alone = Gain("1b", "x", "y", "z", (4096,), TokenTime(1.0, 0.0, 1.0), TokenTime(1.0, 0.0, 0.0))
    assert math.isinf(alone.limit)
