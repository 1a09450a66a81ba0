"""Two processes compute what one does: attention under context parallelism, and whole models on every backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("two_ranks.py")
TENSOR, CONTEXT = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}
ATTENTION = {
    f"{backend}, {'packed' if packed else 'whole'}, window {window}": {
        "kind": "attention",
        "backend": backend,
        "packed": packed,
        "window": window,
    }
    for backend in ("local", "composer")
    for packed in (False, True)
    for window in (None, 5)
}
MODELS = {
    "TP2 local": {"backend": "local", "tied": True, "layout": TENSOR},
    "TP2 composer": {"backend": "composer", "tied": False, "layout": TENSOR},
    "TP2 SP linear": {
        "backend": "composer",
        "parts": {"loss": "linear"},
        "tied": True,
        "sequence_parallel": True,
        "layout": TENSOR,
    },
    "TP2 linear": {"backend": "composer", "parts": {"loss": "linear"}, "tied": False, "layout": TENSOR},
    "CP2 composer": {"backend": "composer", "tied": False, "layout": CONTEXT},
    "CP2 local": {"backend": "local", "tied": True, "layout": CONTEXT},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, float]]:
    """The relative differences of every case, in float64."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = ATTENTION | {name: {"kind": "model", **case} for name, case in MODELS.items()}
    command = [sys.executable, str(PROGRAM), "{}", str(folder / "store"), str(folder / "result"), json.dumps(cases)]
    root = PROGRAM.parents[2]
    paths = os.pathsep.join((str(root), str(root / "kernels")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    processes = [
        subprocess.Popen(
            [word if word != "{}" else str(rank) for word in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return json.loads((folder / "result").read_text())


@pytest.mark.parametrize("name", ATTENTION)
def test_context_parallel_attention_is_attention_to_the_whole(found, name):
    assert max(found[name].values()) < 1e-13, found[name]  # float64, sums in another order


@pytest.mark.parametrize("name", MODELS)
def test_models_on_two_ranks_have_the_losses_and_gradients_of_one(found, name):
    # Everything is float64 but Megatron's own loss, on one side of the comparison or both: one rounding to fp32.
    assert max(found[name].values()) < 5e-7, found[name]
