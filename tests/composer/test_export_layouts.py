"""Runs that several processes trained in several layouts are exported; an export is imported and goes on in another."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.checkpoint import load_run
from composer_megatron.export_hf import export, hf_weights
from composer_megatron.importing.run import import_run
from composer_megatron.sequence import CompositeSequence

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="trains on the CPU; a GPU machine would use nccl")

STAGES = ("--pipeline-model-parallel-size", "2")
LAYOUTS = {
    "tensor": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "interleaved": (*STAGES, "--num-virtual-stages-per-pipeline-rank", "2"),
    "data": ("--use-distributed-optimizer",),
    "windows": ("--tensor-model-parallel-size", "2"),
}


@pytest.fixture(scope="module", autouse=True)
def modules_folder(tmp_path_factory):
    """Where transformers copies the modelling code to; by default the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def exports(place, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """For each layout a run of two steps in two processes, without its tokenizer of numbers, and its export."""
    folder = tmp_path_factory.mktemp("layouts")
    made = {}
    trained = Architecture.load(place.path / "architecture.json")
    shape = dataclasses.replace(trained.shape, window=5)
    Architecture(CompositeSequence.parse("1W2M1A1W2M"), shape).save(folder / "windows.json")
    for name, flags in LAYOUTS.items():
        which = ("--architecture", str(folder / "windows.json")) if name == "windows" else ()
        run = place.run(f"export-{name}", *which, *flags, "--train-iters", "2", "--eval-iters", "0", processes=2)
        assert run.status == 0, run.output
        copy = shutil.copytree(run.folder, folder / name)
        (copy / "tokenizer.json").unlink(missing_ok=True)
        made[name] = (copy, export(copy, folder / f"{name}-hf"))
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_weights_and_the_logits_of_the_run(exports, name):
    run_dir, folder = exports[name]
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    with load_run(run_dir) as run, torch.no_grad():
        wanted = hf_weights(run.model, run.architecture)
        logits = run.model(ids, torch.arange(16).expand_as(ids), None)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    for weight, value in wanted.items():
        assert torch.equal(found[weight], value), weight
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        theirs = model(ids).logits
    # Both are fp32, and sum in different orders (separate or joined matrices).
    torch.testing.assert_close(theirs, logits, atol=1e-5 * float(logits.abs().max()), rtol=0)


def test_an_export_is_imported_and_goes_on_in_another_layout(exports, place, tmp_path):
    """Saved after one step, whose learning rate Megatron's warm-up makes 0: the same weights, resharded and back."""
    _, folder = exports["interleaved"]
    import_run(folder, tmp_path / "run")
    assert Architecture.load(tmp_path / "run/architecture.json") == Architecture.load(folder / "architecture.json")
    start = ("--pretrained-checkpoint", str(tmp_path / "run/checkpoints"), "--train-iters", "1", "--eval-iters", "0")
    warm = ("--lr-warmup-iters", "1", "--lr-decay-iters", "2", "--weight-decay", "0")
    run = place.run("resharded", *start, *warm, *LAYOUTS["tensor"], processes=2)
    assert run.status == 0, run.output
    (run.folder / "tokenizer.json").unlink(missing_ok=True)
    again = load_file(export(run.folder, tmp_path / "again") / "model.safetensors")
    wanted = load_file(folder / "model.safetensors")
    assert again.keys() == wanted.keys()
    for weight, value in wanted.items():
        assert torch.equal(again[weight], value), weight
