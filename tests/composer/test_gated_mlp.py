"""SwiGLU within the MLP's products: what surrounds the kernels, which need a GPU; here PyTorch plays them."""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core", reason="needs the extra [train]")

from composer_megatron import backend as backends
from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.backend import get_backend
from composer_megatron.errors import ComposerError
from composer_megatron.layers import gated_mlp
from composer_megatron.model import build_model
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

torch.set_num_threads(1)
SHAPE = dataclasses.replace(PRESETS["tiny"], vocab_size=48, hidden_size=32, head_dim=8, ffn_hidden_size=48)


def alternating(rows: torch.Tensor) -> torch.Tensor:
    """All of the gate above all of up, to one row of each in turn."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def apart(rows: torch.Tensor) -> torch.Tensor:
    """And back."""
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def gate(x: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    halves = x @ alternating(first).t()
    return halves, F.silu(halves[:, ::2]) * halves[:, 1::2]


def through(dy: torch.Tensor, second: torch.Tensor, halves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        halves = halves.detach().requires_grad_()
        activation = F.silu(halves[:, ::2]) * halves[:, 1::2]
        return torch.autograd.grad(activation, halves, dy @ second)[0], activation.detach()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the products as they are called."""
    calls: list[str] = []
    players = {
        "_gate": gate,
        "_through": through,
        "_to_input": lambda dhalves, first: dhalves @ alternating(first),
        "_accumulate": lambda dhalves, x, buffer: buffer.add_(apart(dhalves.t() @ x)),
        "_gradient": lambda dhalves, x: apart(dhalves.t() @ x),
    }
    for name, play in players.items():
        monkeypatch.setattr(gated_mlp, name, lambda *args, name=name, play=play: (calls.append(name), play(*args))[1])
    monkeypatch.setattr(gated_mlp, "_runs_kernels", lambda x, weight: True)
    monkeypatch.setattr(backends, "require", lambda *_: None)
    return calls


def gradients(parts: dict[str, str], *, buffers: bool) -> dict[str, torch.Tensor]:
    """The loss and all gradients, of autograd or in Megatron's buffers over two micro-batches."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    cpu.prepare_training()
    model = build_model(
        Architecture(CompositeSequence.parse("1M1A2M"), SHAPE), max_sequence_length=8, backend="composer", parts=parts
    )
    run = model
    if buffers:
        for module in model.modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = True
        model.config.gradient_accumulation_fusion = True
        get_backend("composer").install()
        run = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        run.zero_grad_buffer()
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for _ in range(2):
        tokens = torch.randint(48, (2, 9), generator=generator)
        labels = tokens[:, 1:].contiguous()
        loss = run(tokens[:, :-1], torch.arange(8).expand(2, -1), None, labels=labels).mean()
        loss.backward()
        total = total + loss.detach()
    got = {name: weight.main_grad if buffers else weight.grad for name, weight in model.named_parameters()}
    assert all((weight.grad is None) == buffers for weight in model.parameters())
    return {"loss": total} | {name: gradient.clone() for name, gradient in got.items()}


@pytest.mark.parametrize("buffers", [False, True])
def test_losses_and_gradients_are_those_of_the_pass_apart(played: list[str], buffers: bool) -> None:
    wanted = gradients({}, buffers=buffers)
    assert played == []
    got = gradients({"activation": "quack"}, buffers=buffers)
    back = ["_through", "_to_input", "_accumulate" if buffers else "_gradient"]
    assert played == 2 * (3 * ["_gate"] + 3 * back)
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)  # fp32 sums in another order


def test_projections_that_somebody_watches_are_called(played: list[str]) -> None:
    """Megatron's data parallelism waits for gathered weights in hooks on them."""
    model = build_model(
        Architecture(CompositeSequence("M"), SHAPE),
        max_sequence_length=8,
        backend="composer",
        parts={"activation": "quack"},
    )
    seen = []
    tokens, positions = torch.arange(8)[None], torch.arange(8)[None]
    wanted = model(tokens, positions, None)
    assert played == ["_gate"]
    model.decoder.layers[0].mlp.linear_fc1.register_forward_pre_hook(lambda *_: seen.append(0))
    torch.testing.assert_close(model(tokens, positions, None), wanted)
    assert (played, seen) == (["_gate"], [0])


def test_on_a_cpu_the_kernel_of_its_own_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gated_mlp._runs_kernels(torch.zeros(2, 2), torch.zeros(2, 2))
    monkeypatch.setattr(backends, "require", lambda *_: None)
    wanted, got = (gradients(parts, buffers=False) for parts in ({}, {"activation": "quack"}))
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def turned(matrix: torch.Tensor, order: Any) -> torch.Tensor:
    """A matrix with `order` applied along the axis in which its elements do not lie side by side, as quack has it."""
    return order(matrix) if matrix.stride(1) == 1 else order(matrix.t()).t()


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any] | None]]:
    """A package quack in PyTorch with its meaning of layouts; gives the configurations it is called with."""
    configs: list[dict[str, Any] | None] = []

    def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, config: Any, **options: Any) -> None:
        configs.append(config)
        b = turned(b, alternating) if "B" in options["concat_layout"] else b
        result = apart(a @ b) if "out" in options["concat_layout"] else a @ b
        out.copy_(out + result if options.get("add_to_output") else result)

    def gated(x: torch.Tensor, b: torch.Tensor, *, config: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert (options["activation"], options["tuned"], options["concat_layout"]) == ("swiglu", False, ("B",))
        configs.append(config)
        halves = x @ turned(b, alternating)
        return halves, F.silu(halves[:, ::2]) * halves[:, 1::2]

    def dgated(
        dy: torch.Tensor, b: torch.Tensor, halves: torch.Tensor, *, config: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert options == {"activation": "swiglu", "tuned": False, "dynamic_scheduler": False}
        configs.append(config)
        return through(dy, b, halves)

    interface = SimpleNamespace(gemm_gated=gated, gemm_dgated=dgated, gemm_tuned=SimpleNamespace(fn=multiply))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)
    monkeypatch.setitem(sys.modules, "quack.gemm_config", SimpleNamespace(GemmConfig=dict))
    gated_mlp._hopper.cache_clear()
    yield configs
    gated_mlp._hopper.cache_clear()


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_quack_is_given_layouts_and_on_hopper_what_was_measured(
    quack: list[dict[str, Any] | None], monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    x, first, second, dy = (torch.randn(*size) for size in ((6, 8), (20, 8), (8, 10), (6, 8)))
    halves, activation = gated_mlp._gate(x, first)
    dhalves, again = gated_mlp._through(dy, second, halves)
    buffer = torch.ones(20, 8)
    gated_mlp._accumulate(dhalves, x, buffer)
    found = [gated_mlp._to_input(dhalves, first), gated_mlp._gradient(dhalves, x), buffer - 1]
    inputs = [x.requires_grad_(), first.requires_grad_()]
    gate_half, up_half = (inputs[0] @ inputs[1].t()).chunk(2, dim=1)
    whole = F.silu(gate_half) * up_half
    dx, dfirst = torch.autograd.grad(whole, inputs, dy @ second)
    for one, other in zip((activation, again, *found), (whole, whole, dx, dfirst, dfirst), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)  # fp32 sums in another order
    if capability == (10, 0):
        assert quack == 5 * [None]
        return
    names = ("tile_m", "tile_n", "pingpong", "cluster_m", "cluster_n")
    tiles = [tuple(config[name] for name in names) for config in quack]
    product = (128, 256, False, 2, 1)
    assert tiles == [(128, 192, True, 2, 1), (128, 160, True, 2, 1), product, product, product]


@pytest.mark.skipif(importlib.util.find_spec("quack") is not None, reason="it is installed")
def test_without_the_package_a_message_says_what_to_install() -> None:
    with pytest.raises(ComposerError, match=r"activation=quack needs the package quack.*pip install quack-kernels"):
        get_backend("composer", {"activation": "quack"})


@pytest.mark.parametrize("foreign", ["folder", "package", "file"])
def test_another_package_of_that_name_is_no_traceback(
    foreign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder `quack` on the path is a package to Python, too."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "quack"]:
        monkeypatch.delitem(sys.modules, name)
    files = {"folder": "quack/duck.txt", "package": "quack/__init__.py", "file": "quack.py"}
    file = tmp_path / files[foreign]
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise RuntimeError('it must not run')")
    # Alone: a folder without __init__.py counts only where no package of that name is installed.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(ComposerError, match=r"activation=quack needs quack\.gemm_interface, and the .*quack-kernels"):
        backends._within_products()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernels_on_a_gpu() -> None:
    pytest.importorskip("quack.gemm_interface", reason="quack is not installed")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("quack's products are for Hopper and Blackwell")
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.float64, generator=generator)

    x, first, second, dy = draw(512, 256), draw(2 * 384, 256) / 16, draw(256, 384) / 20, draw(512, 256)
    exact = [tensor.bfloat16().double().requires_grad_() for tensor in (x, first, second)]
    up_and_gate = exact[0] @ exact[1].t()
    output = (F.silu(up_and_gate[:, :384]) * up_and_gate[:, 384:]) @ exact[2].t()
    wanted = [output, *torch.autograd.grad(output, exact, dy.bfloat16().double())]
    for buffers in (False, True):
        inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
        sums = [torch.ones_like(tensor, dtype=torch.float32) if buffers else None for tensor in inputs[1:]]
        found = gated_mlp._Gated.apply(*inputs, *sums)
        found.backward(dy.bfloat16())
        weights = [each - 1 for each in sums] if buffers else [each.grad for each in inputs[1:]]
        for one, other in zip((found, inputs[0].grad, *weights), wanted, strict=True):
            # Operands, activation and its gradient are rounded to bf16 (2^-9) before each product.
            assert (one.double() - other).norm() <= 0.01 * other.norm()
