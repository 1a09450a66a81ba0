"""Extrapolation against the paper's layer counts and against a search over all sequences of the pattern."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_search.extrapolate import extrapolate, stack, stretch

parse = CompositeSequence.parse
SHORT, LONG = parse("2A4M"), parse("2A5M2A3M1A3M")


@pytest.mark.parametrize(
    ("shape", "stacked", "stretched"),
    [
        ("350m", "(2A4M)x4", "3A8M3A5M2A5M"),
        ("1b", "(2A4M)x4+1A2M", "4A9M4A5M2A5M"),
        ("3b", "(2A4M)x8", "6A15M6A9M3A9M"),
        ("8b", "(2A4M)x9", "7A17M7A10M4A10M"),
    ],
)
def test_published_layer_counts(shape: str, stacked: str, stretched: str) -> None:
    assert extrapolate(SHORT, PRESETS[shape], method="stack").sequence == parse(stacked)
    assert extrapolate(LONG, PRESETS[shape], method="stretch").sequence == parse(stretched)


@pytest.mark.parametrize(
    ("shape", "stacked", "stretched"),
    [("350m", (8, 16), (8, 18)), ("1b", (9, 18), (10, 19)), ("3b", (16, 32), (15, 33)), ("8b", (18, 36), (18, 37))],
)
def test_published_primitive_counts(shape: str, stacked: tuple[int, int], stretched: tuple[int, int]) -> None:
    for method, sequence, expected in (("stack", SHORT, stacked), ("stretch", LONG, stretched)):
        counts = extrapolate(sequence, PRESETS[shape], method=method).sequence.counts
        assert (counts["A"], counts["M"]) == expected


def test_the_papers_kv_saving_at_1b_is_a_mean_of_two() -> None:
    ratios = [
        extrapolate(sequence, PRESETS["1b"], method=method).summary(4096)["kv_ratio"]
        for method, sequence in (("stack", SHORT), ("stretch", LONG))
    ]
    assert ratios == [16 / 9, 16 / 10]
    assert round(sum(ratios) / 2, 2) == 1.69


@given(st.text(alphabet="AM", min_size=1, max_size=12), st.fractions(1, 12, max_denominator=60))
def test_rules_on_any_sequence(letters: str, scale: Fraction) -> None:
    sequence = CompositeSequence(letters)
    stretched = stretch(sequence, scale)
    assert [run.symbol for run in stretched.runs] == [run.symbol for run in sequence.runs]
    for before, after in zip(sequence.runs, stretched.runs, strict=True):
        assert after.length - 1 < scale * before.length <= after.length
    stacked = stack(sequence, scale)
    copies = int(scale)
    assert stacked.letters.startswith(letters * copies)
    rest = stacked.letters[len(letters) * copies :]
    assert rest == (stretch(sequence, scale - copies).letters if scale > copies else "")


@given(
    st.text(alphabet="AM", min_size=1, max_size=6),
    st.sampled_from(["350m", "1b", "8b"]),
    st.sampled_from(["stack", "stretch"]),
)
def test_matching_parameters_is_never_further_off_than_the_papers_rule(letters: str, name: str, method: str) -> None:
    sequence, shape = CompositeSequence(letters), PRESETS[name]
    target = Architecture(sequence, shape).baseline().matrix_parameters

    def off(architecture: Architecture) -> int:
        return abs(architecture.matrix_parameters - target)

    matched = extrapolate(sequence, shape, method=method, match="parameters")
    assert off(matched) <= off(extrapolate(sequence, shape, method=method))
    # An oracle that tries many scales blindly finds nothing closer.
    grow = {"stack": stack, "stretch": stretch}[method]
    base = Fraction(target, Architecture(sequence, shape).matrix_parameters)
    for step in range(-40, 41):
        scale = base + Fraction(step, 20)
        if scale >= 1:
            assert off(matched) <= off(Architecture(grow(sequence, scale), shape))


def test_matched_stack_at_1b_is_the_smaller_side() -> None:
    matched = extrapolate(SHORT, PRESETS["1b"], match="parameters")
    assert matched.sequence == parse("(2A4M)x4+1A1M")
    assert matched.origin["match"] == "parameters"


def test_bad_requests() -> None:
    with pytest.raises(UsageError, match="unknown method 'stak'"):
        extrapolate(SHORT, PRESETS["1b"], method="stak")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown match"):
        extrapolate(SHORT, PRESETS["1b"], match="size")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="more than the"):
        extrapolate(parse("40M"), PRESETS["tiny"])
