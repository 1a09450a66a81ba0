"""Scales and curves of the report's drawings; `test_report` checks the drawings themselves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_search.report.charts import MOST_POINTS, Axis, thin

finite = st.floats(min_value=-1e12, max_value=1e12, allow_subnormal=False)


@given(st.lists(finite, min_size=1, max_size=20), st.booleans())
def test_axis_holds_its_values(values, whole):
    values = [float(round(value)) for value in values] if whole else values
    axis = Axis.around(values, whole=whole)
    assert all(0 <= axis.place(value) <= 100 for value in values)
    slack = 1e-9 * (axis.high - axis.low)  # a multiple of a step such as 5e-11 is rounded
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in axis.ticks)
    assert 1 - whole <= len(axis.ticks) <= 12
    labels = [axis.label(tick) for tick in axis.ticks]
    assert len(set(labels)) == len(labels)
    for label, tick in zip(labels, axis.ticks, strict=True):
        assert float(label.replace(",", "").replace("−", "-")) == pytest.approx(
            tick, rel=1e-9, abs=1e-9 * max(map(abs, values))
        )


@given(st.integers(1, 5000))
def test_thin_keeps_the_mean(count):
    curve = tuple((step, math.sin(step)) for step in range(count))
    thinned = thin(curve)
    assert len(thinned) <= MOST_POINTS and thinned[-1][0] == count - 1
    if count % len(thinned) == 0:  # then all groups are equal, and the mean of means is the mean
        assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(sum(y for _, y in curve) / count, abs=1e-12)
