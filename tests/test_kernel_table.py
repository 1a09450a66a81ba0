"""The page's table of kernel targets is what the results say."""

import json
from pathlib import Path

import pytest

from composer_megatron.errors import FileError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(load):
    return load("kernel_table")


def row(case, name, graph, fraction, **more):
    return {
        "case": case,
        "name": name,
        "graph": graph,
        "fraction": fraction,
        "bytes": 1e9,
        "peak": 10,
        "note": "",
        **more,
    }


@pytest.fixture
def results(tmp_path):
    """A folder of results; `add` puts a file there."""

    def add(op, rows, **more):
        result = {"op": op, "gpu": "G", "date": "2026-01-02", "rows": rows, "environment": {"packages": {"torch": "9"}}}
        (tmp_path / "g").mkdir(exist_ok=True)
        (tmp_path / "g" / f"kernel-{op}.json").write_text(json.dumps(result | {"ceilings_reached_by": {}} | more))
        return tmp_path

    return add


def cells(text, op, what):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return next(line[2:] for line in lines if line[:2] == [f"`{op}`", what])


def test_the_page_says_what_was_measured(script):
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    assert script.tables(ROOT / "benchmarks/results") in page, "run: python benchmarks/kernel_table.py"


def test_spans_verdicts_and_ratios(script, results):
    rows = [row("forward a", "composer", 2.0, 0.974, of_copy=1.0), row("forward b", "composer", 2.0, 0.9641)]
    rows += [row("backward a", "composer", 2.0, 0.93), row("backward a", "megatron", 6.2, 0.3)]
    text = script.tables(results("swiglu", rows))
    assert text.startswith("G, torch 9, 2026-01-02:")
    assert cells(text, "swiglu", "forward, of copy") == ["≥ 0.97", "0.96 to 0.97", "1.00", "in 1 of 2 cases"]
    assert cells(text, "swiglu", "backward, of copy") == ["≥ 0.93", "0.93", "", "yes"]
    assert cells(text, "swiglu", "backward, Megatron's time / ours") == ["≥ 3", "3.10", "", "yes"]
    assert cells(text, "rope", "both ways, of copy") == ["≥ 0.93", "not measured", "", "–"]


def test_bounds_from_above_and_small_cases(script, results):
    name = "composer main_grad"
    text = script.tables(results("linear_cross_entropy", [row("16384 x 1", name, 1.0, 0.9, peak=1.2e9)]))
    assert cells(text, "linear_cross_entropy", "GB at 16k tokens") == ["≤ 1", "1.20", "", "in 0 of 1 cases"]
    rows = [row("attend 1 x 2", "composer", 1.0, 0.5) | {"bytes": 1e8}, row("attend 8 x 2", "composer", 1.0, 0.9)]
    text = script.tables(results("decode_attention", rows))
    assert cells(text, "decode_attention", "of read, from 256 MB on") == ["≥ 0.85", "0.90", "", "yes"]


def test_a_failed_row_and_an_unsound_ceiling_count_for_nothing(script, results):
    rows = [row("forward a", "composer", None, None), row("forward a", "quack", 1.0, 0.9)]
    text = script.tables(results("rms_norm", rows))
    assert cells(text, "rms_norm", "forward, quack's time / ours")[1] == "not measured"
    folder = results("swiglu", [row("forward a", "composer", 2.0, 1.2)])
    path = folder / "g/kernel-swiglu.json"
    result = json.loads(path.read_text())
    del result["ceilings_reached_by"]
    path.write_text(json.dumps(result))
    assert cells(script.tables(folder), "swiglu", "forward, of copy")[1] == "not measured"


def test_a_peer_that_refuses_is_quoted(script, results):
    rows = [row("attend 1 x 2", "composer", 1.0, 0.5), row("attend 1 x 2", "fa4 split-KV", None, None, note="no | 9.0")]
    text = script.tables(results("decode_attention", rows))
    cell = cells(text, "decode_attention", "FlashAttention 4's time / ours, batch 1")
    assert cell == ["≥ 1.3", "the peer cannot: no / 9.0", "", "–"]


def test_the_linear_loss_is_compared_where_it_adds_to_main_grad(script, results):
    rows = [row("4096 x 1", "composer main_grad", 2.0, 0.9), row("4096 x 1", "quack chunked", 2.1, 0.9)]
    text = script.tables(results("linear_cross_entropy", rows))
    what = "quack's chunked time / ours into `main_grad`"
    assert cells(text, "linear_cross_entropy", what) == ["≥ 1", "1.05", "", "yes"]


def test_every_case_where_a_peer_is_faster_is_listed(script, results):
    times = {"a": (2e-6, 1.9e-6), "b": (2e-6, 1.99e-6), "c": (2e-6, 3e-6)}
    rows = [
        row(case, name, t, 0.9)
        for case, pair in times.items()
        for name, t in zip(("composer", "te"), pair, strict=True)
    ]
    said = script.tables(results("swiglu", [*rows, row("d", "composer", 1e-6, 0.9)])).partition("Of ")[2].split("\n")
    assert said[0].endswith("same work, ours is faster in 1, within 1 % in 1 and slower in 1:")
    assert said[2:] == [said[2], "|---|---|---|---|---|---|---|", "| `swiglu` | a | composer | 2.0 | te | 1.9 | 0.95 |"]
    text = script.tables(results("swiglu", [row("d", name, 1e-6, 0.9) for name in ("composer", "te")]))
    assert text.endswith("same work, ours is faster in 0, within 1 % in 1 and slower in 0.")


def test_only_what_is_between_the_marks_changes(script, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    assert script.update(page, "new")
    assert page.read_text() == f"before\n{script.BEGIN}\nnew\n{script.END}\nafter\n"
    assert not script.update(page, "new")
    page.write_text("no marks")
    with pytest.raises(FileError, match="has no lines"):
        script.update(page, "new")
