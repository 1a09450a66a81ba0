"""``bench kernels``: which scripts run, what becomes of one that fails, and what the table says of a slower kernel."""

import json

import pytest
import torch

from composer_megatron.bench import kernels as bench
from composer_megatron.errors import ComposerError, UsageError


def row(case, name, graph, note="", size=8):
    return {"case": case, "name": name, "graph": graph, "fraction": graph and 0.5, "note": note, "bytes": size}


RESULT = {
    "op": "swiglu",
    "rows": [
        row("forward", "composer inplace", 0.5),
        row("forward", "composer", 1.0),
        row("forward", "liger", 1.5),
        row("forward", "liger, half", 1.0, size=4),
        row("forward", "te", None, "ImportError: none"),
        row("backward", "composer", 3.0),
        row("backward", "torch", 2.4),
        row("alone", "composer", 1.0),
        row("broken", "composer", None, "RuntimeError: no"),
        row("broken", "torch", 1.0),
    ],
}


def test_verdicts_take_our_row_and_the_best_peer_for_each_byte():
    forward, backward, alone, broken = bench.verdicts(RESULT)
    assert (forward.name, forward.peer, forward.advantage) == ("composer", "liger", 1.5)
    assert backward.advantage == pytest.approx(0.8)
    assert (alone.peer, alone.advantage) == (None, None)
    assert (broken.seconds, broken.advantage, broken.note) == (None, None, "RuntimeError: no")


@pytest.mark.parametrize(
    ("op", "names", "judged"),
    [
        ("rope", ["quack", "te, angles", "composer", "composer, angles"], {"composer": 1, "composer, angles": 2}),
        ("attention", ["composer", "composer triton", "cudnn itself"], {"composer triton": 3}),
        ("attention", ["composer", "itself"], {"composer": 2}),
        ("linear_cross_entropy", ["products alone", "liger sm90", "composer main_grad"], {"composer main_grad": 2}),
        ("wgrad_accumulate", ["torch.mm, bf16", "te", "composer"], {"composer": 2}),
        ("fp8", ["two passes", "composer"], {"composer": None}),
        ("fp8", ["bf16", "fp8 rows"], {"composer": None}),
    ],
)
def test_only_who_does_the_same_work_is_a_peer(op, names, judged):
    rows = [row("a", name, float(place)) for place, name in enumerate(names, 1)]
    found = {verdict.name: verdict.peer_seconds for verdict in bench.verdicts({"op": op, "rows": rows})}
    assert found == judged


def test_every_operation_of_the_checkout_has_a_benchmark():
    kernels = bench.ROOT / "kernels" / "composer_kernels"
    modules = {path.stem for path in kernels.glob("*.py") if not path.stem.startswith("_")}
    assert {"fp8_swiglu", "overlap"} < modules  # the one is timed with fp8, the other is no operation
    assert "from composer_kernels.fp8_swiglu import" in (bench.ROOT / "benchmarks" / "bench_fp8.py").read_text()
    assert set(bench.scripts()) == modules - {"fp8_swiglu", "overlap"}


def test_scripts_run_in_their_own_processes_and_a_failure_ends_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(
        "import json, sys\n"
        "import composer_kernels, composer_megatron\n"
        f"open(sys.argv[2], 'w').write({json.dumps(RESULT)!r})\n"
        "print('table', sys.argv[3:])\n"
    )
    bad.write_text("raise SystemExit('this peer broke')\n")
    assert bench.run({"broken": bad, "swiglu": good}, tmp_path, ["--quick"]) == ["broken"]
    printed = capfd.readouterr()
    assert "table ['--quick']" in printed.out and "this peer broke" in printed.err
    assert [verdict.op for verdict in bench.load(tmp_path, ["broken", "swiglu"])] == ["swiglu"] * 4


def test_what_is_refused(tmp_path, monkeypatch):
    known = bench.scripts()
    assert list(bench.choose([], known)) == list(known)
    assert list(bench.choose(["swiglu"], known)) == ["swiglu"]
    with pytest.raises(UsageError, match=r"'siglu': no such kernel benchmark; there are .*swiglu"):
        bench.choose(["siglu"], known)
    with pytest.raises(ComposerError, match="they come with a checkout"):
        bench.scripts(tmp_path / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ComposerError, match="need a CUDA GPU"):
        bench.run(known, tmp_path)
