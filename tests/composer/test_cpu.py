"""What Megatron asks of CUDA is answered on a CPU, and left alone on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from composer_megatron import cpu


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    return os.environ


def replacements():
    return [cpu._CURRENT_DEVICE, *cpu._torch_replacements(), *cpu._megatron_replacements()]


def test_every_replacement_replaces_something_and_says_why():
    for replacement in replacements():
        assert callable(getattr(replacement.owner, replacement.name)), replacement.name
        assert len(replacement.why) > 10
    names = [(replacement.owner, replacement.name) for replacement in replacements()]
    assert len(set(names)) == len(names)


def test_on_a_gpu_nothing_happens(monkeypatch, environment):
    monkeypatch.setattr(cpu, "has_gpu", lambda: True)
    before = [getattr(replacement.owner, replacement.name) for replacement in replacements()]
    cpu.prepare_model()
    cpu.prepare_training()
    cpu.skip_compilation()
    assert [getattr(replacement.owner, replacement.name) for replacement in replacements()] == before
    assert "TORCHDYNAMO_DISABLE" not in environment


@pytest.mark.parametrize(("given", "disabled"), [(None, True), ("1", True), ("0", False)])
def test_compilation_is_skipped_unless_the_user_says_otherwise(monkeypatch, environment, given, disabled):
    monkeypatch.setattr(cpu, "has_gpu", lambda: False)
    if given is not None:
        environment["TORCHDYNAMO_DISABLE"] = given
    cpu.skip_compilation()
    calls = []

    @torch.compile(backend=lambda graph, inputs: calls.append(graph) or graph.forward)
    def function(x):
        return x + 1

    assert function(torch.ones(1)) == 2
    assert (not calls) is disabled


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), "cpu", "meta"])
def test_cuda_means_the_cpu(device):
    with cpu._CudaMeansCPU():
        found = {
            torch.zeros(2, device=device).device.type,
            torch.tensor([1], device=device).device.type,
            torch.empty_like(torch.zeros(2), device=device).device.type,
        }
    assert found == {"meta" if device == "meta" else "cpu"}


def test_type_names_are_those_of_a_gpu():
    tensor = torch.zeros(1, dtype=torch.bfloat16)
    assert cpu._cuda_type(tensor) == "torch.cuda.BFloat16Tensor"
    assert cpu._cuda_type(tensor, torch.float32).dtype is torch.float32


def test_generator_states_go_there_and_back():
    torch.manual_seed(1)
    state = cpu._get_rng_state(device="cuda", clone=True)
    first = torch.rand(2)
    cpu._set_rng_state(state, device=-1, graph_safe=False)
    assert torch.equal(torch.rand(2), first)


def test_importing_starts_nothing_and_replaces_nothing():
    program = (
        "import torch; before = torch.cuda.current_device, torch.Tensor.type\n"
        "import composer_megatron.cpu, sys\n"
        "assert before == (torch.cuda.current_device, torch.Tensor.type)\n"
        "assert not torch.cuda.is_initialized() and 'megatron' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
