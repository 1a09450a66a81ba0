"""Every parallel layout computes what one process does: losses, all gradients, and the checkpoint, tensor by tensor.

`tools/compare_layouts.py` makes the comparison, in float64; it starts the processes of one world size once for all of
its cases, by forking, so that eighty comparisons take a minute.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from composer_megatron import cpu

pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="compares CPU processes; test_gpu has the comparison on GPUs")
ROOT = Path(__file__).parents[2]
EXACT = 1e-13
"""Relative, in float64: sums in another order differ by a few 1e-16; context-parallel softmax by up to 1e-14."""
LOSS_IN_FP32 = 1e-6
"""Megatron's cross entropy over a split vocabulary works in float32 (epsilon 1.2e-7) whatever the logits' type."""


def compare(folder: Path, *options: str) -> list[dict]:
    """What the tool finds; tests look at its numbers, not at its exit status alone."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/compare_layouts.py"), *options, "--json", str(folder / "results.json")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert (folder / "results.json").is_file(), done.stderr
    return json.loads((folder / "results.json").read_text())


def assert_equal(result: dict, tolerance: float | None = None) -> None:
    case = result["case"]
    if tolerance is None:
        tolerance = LOSS_IN_FP32 if "TP2" in case["layout"] else EXACT
    assert result["gradient"] <= tolerance, (case, result["tensor"], result["gradient"])
    assert result["loss"] <= max(tolerance, LOSS_IN_FP32 if "CP2" in case["layout"] else 0), (case, result["loss"])
    assert result["checkpoint"], case


def test_the_table(tmp_path):
    """Four sequences that break symmetry in twenty layouts of two, four and eight processes."""
    results = compare(tmp_path)
    assert len(results) == 80
    for result in results:
        assert_equal(result)
    assert max(result["gradient"] for result in results) > 0  # compared with something else than itself


def test_our_backend_in_layouts_that_split_its_parts(tmp_path):
    """Norm, attention, rotary embedding and loss of `composer_kernels`, by their reference implementation on a CPU.

    That loss is float64 all through, under tensor parallelism, too.
    """
    layouts = ("TP2+SP", "PP2@uneven", "CP2", "TP2+SPxPP2")
    options = [part for layout in layouts for part in ("--layout", layout)]
    results = compare(tmp_path, "--sequence", "2A4M", "--backend", "composer", *options)
    for result in results:
        assert_equal(result, tolerance=1e-12)
    assert len(results) == len(layouts)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """A random sequence in a random layout of two to eight processes, cut anywhere."""
    letters = draw(st.text("AM", min_size=1, max_size=9))
    tensor, context, data = (draw(st.sampled_from((1, 2))) for _ in range(3))
    pipeline = draw(st.sampled_from([size for size in (1, 2, 4) if tensor * context * data * size <= 8]))
    virtual = draw(st.sampled_from((1, 2))) if pipeline > 1 and 4 // data % pipeline == 0 else 1
    if tensor * context * data * pipeline == 1:
        tensor = 2
    parts = [f"TP{tensor}" + ("+SP" if tensor > 1 and draw(st.booleans()) else ""), f"PP{pipeline}", f"VPP{virtual}"]
    parts += [f"CP{context}", f"DP{data}" + ("+DO" if data > 1 and draw(st.booleans()) else "")]
    layout = "x".join(part for part in parts if not part.endswith("P1"))
    if pipeline > 1:
        count = pipeline * virtual - 1
        bars = sorted(draw(st.lists(st.integers(0, len(letters)), min_size=count, max_size=count)))
        layout += "@" + ",".join(str(end - start) for start, end in zip([0, *bars], [*bars, len(letters)], strict=True))
    return {"sequence": letters, "layout": layout, "tied": draw(st.booleans())}


@settings(
    max_examples=1,
    derandomize="CI" in os.environ,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(batch=st.lists(cases(), min_size=12, max_size=12, unique_by=lambda case: tuple(case.values())))
def test_random_sequences_and_cuts(tmp_path_factory, batch):
    """A dozen at once, since processes are dear; a failing one is named."""
    folder = tmp_path_factory.mktemp("random")
    (folder / "cases.json").write_text(json.dumps(batch))
    results = compare(folder, "--cases", str(folder / "cases.json"))
    assert [result["case"] | case for result, case in zip(results, batch, strict=True)] == [r["case"] for r in results]
    for result in results:
        event(result["case"]["layout"])
        assert_equal(result)


def test_a_wrong_layout_is_one_message():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/compare_layouts.py"), "--layout", "XP2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: layout 'XP2': 'XP2' is none of TP2, TP2+SP, PP4, VPP2, CP2, DP2+DO and the like\n"
