"""What only a GPU can show: models live there whole, agree with the CPU, decode there; two GPUs agree with one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from composer_megatron.architecture import Architecture
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ARCHITECTURE = Architecture(CompositeSequence.parse("2A4M1A"), PRESETS["demo"])  # two KV groups: TP=2 divides them


def test_the_whole_model_is_on_the_gpu_and_agrees_with_the_cpu(tmp_path: Path) -> None:
    """In fp32; the CPU's logits come from a process that sees no GPU."""
    from composer_megatron.model import build_model

    model = build_model(ARCHITECTURE, max_sequence_length=32).eval()
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    program = """
import sys, torch
from composer_megatron.architecture import Architecture
from composer_megatron.model import build_model
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
model = build_model(Architecture(CompositeSequence.parse("2A4M1A"), PRESETS["demo"]), max_sequence_length=32).eval()
model.load_state_dict(torch.load(sys.argv[1], map_location="cpu"))
tokens = torch.arange(64).view(2, 32)
torch.save(model(tokens, torch.arange(32).expand(2, -1), None), sys.argv[1])
"""
    path = tmp_path / "weights.pt"
    torch.save({name: value.cpu() for name, value in model.state_dict().items() if torch.is_tensor(value)}, path)
    subprocess.run(
        [sys.executable, "-c", program, str(path)], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True
    )
    tokens = torch.arange(64, device="cuda").view(2, 32)
    with torch.no_grad():
        logits = model(tokens, torch.arange(32, device="cuda").expand(2, -1), None)
    # fp32 on both sides, different summation orders: a few units in the last place of logits of about 1.
    torch.testing.assert_close(logits.cpu(), torch.load(path), atol=2e-5, rtol=2e-5)


def test_greedy_decoding_with_the_cache_equals_the_full_pass() -> None:
    from composer_megatron.generate import generate_tokens
    from composer_megatron.model import build_model

    model = build_model(ARCHITECTURE, max_sequence_length=48).eval()
    prompt = list(range(5, 17))
    found = generate_tokens(model, prompt, max_new_tokens=24)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(24):
            batch = torch.tensor([tokens], device="cuda")
            logits = model(batch, torch.arange(len(tokens), device="cuda")[None], None)
            tokens.append(int(logits[0, -1].argmax()))
    assert found == tokens[len(prompt) :]


def test_throughput_measurement_runs(tmp_path: Path) -> None:
    from composer_megatron.bench.training import TrainingBenchmark, run_training

    output = tmp_path / "training.json"
    asked = TrainingBenchmark(
        shapes=("60m",), models=("llama",), backends=("composer", "local"), lengths=(512,), step_tokens=4096
    )
    run_training(asked, output)
    result = json.loads(output.read_text())
    assert result["ceilings"]["gemm"] > 1e12
    for row in result["rows"]:
        assert row["note"] == ""
        assert row["tokens_per_second"] > 0
        assert row["breakdown"]["gemm"] > 0


@pytest.mark.parametrize("backend", ["composer", "te"])
def test_backends_have_the_losses_and_gradients_of_local(backend: str) -> None:
    """In bf16, fresh weights of equal numbers: the same model whoever plays the parts."""
    if backend == "te":
        pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed")
    from composer_megatron.model import build_model

    architecture = dataclasses.replace(ARCHITECTURE, shape=dataclasses.replace(ARCHITECTURE.shape, head_dim=64))
    tokens = torch.randint(0, architecture.shape.vocab_size, (2, 128), device="cuda")
    positions = torch.arange(128, device="cuda").expand(2, -1)
    found = {}
    for name in ("local", backend):
        model = build_model(architecture, max_sequence_length=128, dtype=torch.bfloat16, backend=name)
        loss = model(tokens, positions, None, labels=tokens.roll(-1, 1)).float().mean()
        loss.backward()
        gradients = {key: weight.grad.float().cpu() for key, weight in model.named_parameters()}
        found[name] = float(loss), gradients
    wanted, got = found["local"], found[backend]
    assert got[0] == pytest.approx(wanted[0], rel=2**-8)
    assert list(got[1]) == list(wanted[1])
    for key, gradient in wanted[1].items():
        # Seven blocks, each with a handful of bf16 roundings of 2^-9: an error of some per cent in norm.
        assert (got[1][key] - gradient).norm() <= 0.05 * gradient.norm(), key


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("layout", [("--pp", "2"), ("--tp", "2"), ()], ids=["PP2", "TP2+SP", "DP2"])
def test_two_gpus_give_the_losses_of_one(layout: tuple[str, ...], tmp_path: Path) -> None:
    """Five steps in fp32 through the program itself, NCCL between the two."""
    alone, together = losses(tmp_path, "one", "1", ()), losses(tmp_path, "two", "2", layout)
    # TF32 is off; the summation orders of NCCL and of split GEMMs differ.
    assert together == pytest.approx(alone, rel=1e-5)
    assert len(alone) == 5


TWO_GPUS = ("TP2", "TP2+SP", "PP2", "PP2@uneven", "PP2xVPP2", "PP2xVPP2@uneven", "CP2", "DP2", "DP2+DO")


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("local", "float64", 1e-6),  # Megatron's loss over a split vocabulary is fp32 whatever the logits are
        ("composer", "float32", 1e-3),  # kernels sum in fp32, in another order where a rank holds other widths
    ],
)
def test_every_gradient_through_nccl(backend: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    """Sequences that break symmetry, against one process: `tests/composer/test_equality.py` on two GPUs."""
    tool, results = Path(__file__).parents[2] / "tools/compare_layouts.py", tmp_path / "results.json"
    sequences = [part for sequence in ("1A", "7M", "2A5M2A3M1A3M") for part in ("--sequence", sequence)]
    layouts = [part for layout in TWO_GPUS for part in ("--layout", layout)]
    how = ["--backend", backend, "--dtype", dtype, "--tolerance", str(tolerance), "--json", str(results)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tool.parents[1]), str(tool.parents[1] / "kernels")))}
    subprocess.run([sys.executable, str(tool), *sequences, *layouts, *how], env=environment, check=False)
    found = json.loads(results.read_text())
    assert len(found) == 3 * len(TWO_GPUS)
    for result in found:
        assert max(result["gradient"], result["loss"]) <= tolerance, result
        assert result["checkpoint"], result


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("shape", ["1b", "3b"])
def test_wide_models_in_bf16_have_one_loss_in_every_layout(shape: str, tmp_path: Path) -> None:
    """Six blocks of the real widths, five steps; the vocabulary is the text's, so that it fits beside Adam's state."""
    widths = dataclasses.replace(PRESETS[shape], vocab_size=4096)
    architecture = Architecture(CompositeSequence.parse("1A2M1A2M"), widths)
    alone = losses(tmp_path, "one", "1", (), architecture=architecture, flags=())
    for name, layout in {"tp": ("--tp", "2"), "pp": ("--pp", "2"), "dp": ()}.items():
        together = losses(tmp_path, name, "2", layout, architecture=architecture, flags=())
        # A bf16 value has 8 bits; the mean over some thousand tokens has less noise than one of them.
        assert together == pytest.approx(alone, rel=2**-8)
    context = ("--context-parallel-size", "2")
    together = losses(tmp_path, "cp", "2", (), architecture=architecture, flags=context)
    assert together == pytest.approx(alone, rel=2**-8)


def losses(
    folder: Path,
    name: str,
    processes: str,
    layout: tuple[str, ...],
    *,
    architecture: Architecture = ARCHITECTURE,
    flags: tuple[str, ...] = ("--fp32",),
) -> list[float]:
    file, text = folder / "architecture.json", folder / "text"
    architecture.save(file)
    tools = Path(__file__).parents[2] / "tools" / "preprocess_text.py"
    words = ["--output", str(text), "--vocab-size", "4096", "--max-bytes", "500000"]
    subprocess.run([sys.executable, str(tools), *words], check=True)
    numbers = ["--steps", "5", "--seq-len", "64", "--micro-batch-size", "2", "--global-batch-size", "8"]
    places = ["--architecture", str(file), "--text", str(text), "--run-dir", str(folder / name)]
    program = [sys.executable, "-m", "composer_megatron", "train", *places, *numbers, "--processes", processes]
    subprocess.run([*program, *layout, "--", *flags], check=True)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["value"] for line in lines if line["name"] == "lm loss"]
