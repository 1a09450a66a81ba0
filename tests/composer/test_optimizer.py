"""Adam in Megatron on gloo: losses of the distributed optimizer, and what becomes of them over checkpoints."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from composer_megatron import cpu, optimizer
from composer_megatron.architecture import Architecture
from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import read_json_lines
from composer_megatron.optimizer import ComposerAdam, TorchAdam, checkpoint_flags, using_optimizer
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

ROOT = Path(__file__).parents[2]
on_cpu = pytest.mark.skipif(cpu.has_gpu(), reason="these runs are compared on the CPU; a GPU machine would use nccl")
SAME = 1e-5
"""Relative, for losses under another layout: sums in another order differ by 1e-7, and Adam carries them on."""

TP2, PP2 = {"tensor": 2}, {"pipeline": 2}
FIRST, REST = {"last": 3}, {"first": 4}
OURS = ("composer", "torch")


def start(folder: Path, processes: int, jobs: list[dict]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("optimizer_runs.py")), str(folder), json.dumps(jobs)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Losses and gradient norms by the name of the run: six steps, or from the fourth on where one was loaded."""
    folder = tmp_path_factory.mktemp("optimizer")
    stock = {"adam": "", "distributed": False}
    start(
        folder,
        1,
        [
            {"name": "one", **stock},
            {"name": "one first", **stock, **FIRST, "save": "stock"},
            {"name": "one resumed", **stock, **REST, "load": "stock"},
            {"name": "dp1 first", "adam": "torch", **FIRST, "save": "dp1"},
        ],
    )
    jobs = [{"name": "dp1 to dp2", "adam": "composer", **REST, "load": "dp1"}]
    for adam, other in (OURS, OURS[::-1]):
        jobs += [
            {"name": f"dp2 {adam}", "adam": adam},
            {"name": f"dp2 first {adam}", "adam": adam, **FIRST, "save": adam},
            {"name": f"dp2 resumed {adam}", "adam": adam, **REST, "load": adam},
            {"name": f"dp2 to tp2 {adam}", "adam": adam, **REST, **TP2, "load": adam},
            {"name": f"dp2 to pp2 {adam}", "adam": adam, **REST, **PP2, "load": adam},
            {"name": f"tp2 first {adam}", "adam": adam, **FIRST, **TP2, "save": f"tp2 {adam}"},
            {"name": f"tp2 to dp2 {adam}", "adam": adam, **REST, "load": f"tp2 {adam}"},
            {"name": f"pp2 first {adam}", "adam": adam, **FIRST, **PP2, "save": f"pp2 {adam}"},
            {"name": f"pp2 to dp2 {adam}", "adam": adam, **REST, "load": f"pp2 {adam}"},
            {"name": f"dp2 {other} to {adam}", "adam": other, **REST, "load": adam},
            {"name": f"plain {adam} from Megatron", "adam": adam, **REST, "load": "stock", "distributed": False},
            {"name": f"plain {adam}", "adam": adam, **FIRST, "save": f"plain {adam}", "distributed": False},
            {"name": f"Megatron from plain {adam}", **stock, **REST, "load": f"plain {adam}"},
            {"name": f"plain {adam} resumed", "adam": adam, **REST, "load": f"plain {adam}", "distributed": False},
            {"name": f"bf16 {adam}", "adam": adam, "bf16": True},
            {"name": f"bf16 first {adam}", "adam": adam, **FIRST, "bf16": True, "save": f"bf16 {adam}"},
            {"name": f"bf16 resumed {adam}", "adam": adam, **REST, "bf16": True, "load": f"bf16 {adam}"},
        ]
    start(folder, 2, jobs)
    start(folder, 1, [{"name": f"dp2 to dp1 {adam}", "adam": adam, **REST, "load": adam} for adam in OURS])
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def flat(pairs) -> list[float]:
    return [number for pair in pairs for number in pair]


@on_cpu
@pytest.mark.parametrize("adam", OURS)
def test_losses_are_those_of_one_process(steps, adam):
    assert flat(steps[f"dp2 {adam}"]) == pytest.approx(flat(steps["one"]), rel=SAME)
    losses = [loss for loss, _ in steps["one"]]
    assert len(set(losses)) == 6


@on_cpu
@pytest.mark.parametrize("kind", ["dp2", "bf16"])
@pytest.mark.parametrize("adam", OURS)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(steps, adam, kind):
    """To the bit, from fp32 weights and from masters of bf16 ones."""
    assert steps[f"{kind} first {adam}"] == steps[f"{kind} {adam}"][:3]
    assert steps[f"{kind} resumed {adam}"] == steps[f"{kind} {adam}"][3:]


@on_cpu
@pytest.mark.parametrize("adam", OURS)
@pytest.mark.parametrize("change", ["dp2 to tp2", "dp2 to pp2", "dp2 to dp1", "tp2 to dp2", "pp2 to dp2"])
def test_a_checkpoint_goes_on_under_any_layout(steps, adam, change):
    assert flat(steps[f"{change} {adam}"]) == pytest.approx(flat(steps["one"][3:]), rel=SAME)


@on_cpu
@pytest.mark.parametrize(
    "name",
    [
        "dp1 to dp2",
        *[f"dp2 {other} to {adam}" for adam, other in (OURS, OURS[::-1])],
        *[f"{what}" for adam in OURS for what in (f"plain {adam} from Megatron", f"Megatron from plain {adam}")],
        *[f"plain {adam} resumed" for adam in OURS],
        "one resumed",
    ],
)
def test_a_checkpoint_of_one_adam_goes_on_with_another(steps, name):
    """Also with the one that Megatron itself would take from PyTorch, in both directions."""
    assert flat(steps[name]) == pytest.approx(flat(steps["one"][3:]), rel=SAME)


def trained(folder: Path, name: str) -> dict[tuple[str, int], float]:
    lines = read_json_lines(folder / name / "metrics.jsonl")
    return {(line["name"], line["iteration"]): line["value"] for line in lines if "lm loss" in line["name"]}


@on_cpu
def test_a_killed_run_with_the_distributed_optimizer_goes_on(text_folder, tmp_path):
    """As a user starts it, on two ranks, with several buckets and everything overlapped; compared with one process."""
    shape = dataclasses.replace(PRESETS["tiny"], hidden_size=32, ffn_hidden_size=64, head_dim=8, vocab_size=300)
    Architecture(CompositeSequence.parse("1A2M"), shape).save(tmp_path / "architecture.json")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    flags = {
        "--architecture": tmp_path / "architecture.json",
        "--text": text_folder,
        "--train-iters": 8,
        "--lr": 0.005,
        "--seq-length": 16,
        "--micro-batch-size": 2,
        "--global-batch-size": 8,
        "--log-interval": 1,
        "--eval-iters": 1,
        "--save-interval": 2,
    }
    common = ["-m", "composer_megatron.train", *(str(part) for pair in flags.items() for part in pair)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sharded = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    several = ["--ddp-bucket-size", "4000", "--backend", "composer", "--run-dir", str(tmp_path / "two")]
    two = [sys.executable, *torchrun, *common, *sharded, *several]
    metrics = tmp_path / "two/metrics.jsonl"
    killed = subprocess.Popen(
        two, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"iteration": 5' in metrics.read_text()):
        assert killed.poll() is None, killed.stdout.read().decode()
        assert time.monotonic() < deadline, "no iteration 5 in two minutes"
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    before = trained(tmp_path, "two")
    one = [sys.executable, *common, "--backend", "local", "--run-dir", str(tmp_path / "one")]
    for command in (two, one):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    resumed, whole = trained(tmp_path, "two"), trained(tmp_path, "one")
    assert resumed == pytest.approx(whole, rel=SAME)
    assert {key: resumed[key] for key in before} == before


SHAPES = [(7, 3), (5,), (0,)]


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in SHAPES]


def groups(params, **numbers) -> list[dict]:
    return [{"params": params[:1], **numbers}, {"params": params[1:], "weight_decay": 0.0, **numbers}]


def train(adam: torch.optim.Optimizer, params: list[torch.Tensor], seeds: range) -> list[torch.Tensor]:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        adam.step()
    return [param.detach().clone() for param in params]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)  # a few roundings in fp32


@pytest.mark.parametrize("kind", [ComposerAdam, TorchAdam])
def test_steps_are_torchs_and_states_load_both_ways(kind):
    ours, theirs = parameters(), parameters()
    numbers = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}
    adam, torchs = kind(groups(ours), **numbers), torch.optim.AdamW(groups(theirs), **numbers)
    assert_equal(train(adam, ours, range(3)), train(torchs, theirs, range(3)))
    states = adam.state_dict(), torchs.state_dict()
    assert [group["step"] for group in states[0]["param_groups"]] == [3, 3]
    for one, two in zip(*(state["state"].values() for state in states), strict=True):
        assert list(one) == list(two) == ["step", "exp_avg", "exp_avg_sq"]
        assert one["step"] == two["step"] == 3
    assert all(list(state) == ["exp_avg", "exp_avg_sq"] for state in adam.state.values())
    crossed = kind(groups(theirs)), torch.optim.AdamW(groups(ours))
    for other, state in zip(crossed, reversed(states), strict=True):
        other.load_state_dict(state)
    assert_equal(train(crossed[0], theirs, range(3, 6)), train(crossed[1], ours, range(3, 6)))


def test_the_groups_count_is_the_one_that_counts():
    """TransformerEngine and Apex have no other; Megatron fills in counts of before the load."""
    params = parameters()
    adam = TorchAdam(groups(params))
    train(adam, params, range(2))
    state = adam.state_dict()
    for group in state["param_groups"]:
        group["step"] = 9.0
    adam.load_state_dict(state)
    assert [group["step"] for group in adam.param_groups] == [9, 9]
    for group in state["param_groups"]:
        del group["step"]
    adam.load_state_dict(state)
    assert [group["step"] for group in adam.param_groups] == [2, 2]
    assert {"step", "exp_avg"} <= state["state"][0].keys()  # what was loaded from is left as it was


def test_weight_decay_within_the_gradient():
    ours, theirs = parameters(), parameters()
    adam = TorchAdam(ours, lr=0.1, weight_decay=0.1, adam_w_mode=False)
    torchs = torch.optim.Adam(theirs, lr=0.1, weight_decay=0.1)
    assert_equal(train(adam, ours, range(3)), train(torchs, theirs, range(3)))
    with pytest.raises(UsageError, match="decoupled weight decay only"):
        ComposerAdam(ours, adam_w_mode=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capturable": True}, "--optimizer-cuda-graph needs TransformerEngine's"),
        ({"exp_avg_dtype": torch.bfloat16}, "exp_avg_dtype: the precision-aware optimizer is TransformerEngine's"),
    ],
)
def test_what_only_transformer_engine_can_do(options, message):
    for kind in (ComposerAdam, TorchAdam):
        with pytest.raises(UsageError, match=message):
            kind(parameters(), **options)


def test_a_closure_and_parameters_without_gradients():
    first, second, _ = params = parameters()
    adam = ComposerAdam(params)

    def closure() -> torch.Tensor:
        loss = (first**2).sum()
        loss.backward()
        return loss

    before = first.detach().clone(), second.detach().clone()
    assert adam.step(closure) == (before[0] ** 2).sum()
    assert not torch.equal(first, before[0])
    assert torch.equal(second, before[1])


def test_names_in_megatron_come_back():
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    owners = (megatron_optimizer, distrib_optimizer, clip_grads, distrib_optimizer.DistributedOptimizer)
    before = [dict(vars(owner)) for owner in owners]
    installed = distrib_optimizer.Adam.__module__.partition(".")[0] != "torch"
    for name, used in {"composer": "composer", "torch": "torch", "auto": "composer", "megatron": "torch"}.items():
        if installed and name in ("auto", "megatron"):
            continue
        with using_optimizer(name) as found, using_optimizer(name) as again:
            assert found == again == used
            assert issubclass(megatron_optimizer.Adam, ComposerAdam if used == "composer" else TorchAdam)
    assert [dict(vars(owner)) for owner in owners] == before
    assert all(before[0][name] is getattr(megatron_optimizer, name) for name in ("Adam", "USING_PYTORCH_OPTIMIZER"))


@pytest.mark.parametrize("adam", ["auto", "megatron"])
@pytest.mark.parametrize(("package", "used"), [("transformer_engine", "te"), ("apex", "apex")])
def test_an_installed_adam_is_left_to_megatron(adam, package, used, monkeypatch):
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    fused = type("FusedAdam", (), {"__module__": f"{package}.optimizers"})
    monkeypatch.setattr(distrib_optimizer, "Adam", fused)
    monkeypatch.setattr(megatron_optimizer, "Adam", fused)
    with using_optimizer(adam) as found:
        assert found == used
        assert megatron_optimizer.Adam is fused
    with using_optimizer("composer") as found:
        assert found == "composer"
        assert megatron_optimizer.Adam is ComposerAdam


def test_clipping_is_megatrons():
    grads = [param.detach().clone() for param in parameters()]
    copies = [grad.clone() for grad in grads]
    norm, _ = optimizer._norm(1, torch.zeros(1), [grads], False)
    torch.testing.assert_close(norm, torch.cat([grad.flatten() for grad in grads]).norm().view(1))
    optimizer._scale(1, torch.zeros(1), [grads, copies], 0.5)
    assert_equal(copies, [grad * 0.5 for grad in grads])
    optimizer._scale(1, torch.zeros(1), [grads, grads], 0.5)
    assert_equal(grads, copies)


def test_the_flag_that_lets_checkpoints_load_anywhere():
    flag = {"--dist-ckpt-optim-fully-reshardable": None}
    asked = {"use_distributed_optimizer": True}
    assert checkpoint_flags(asked) == flag
    assert checkpoint_flags({}) == {}
    assert checkpoint_flags(asked | {"ckpt_format": "fsdp_dtensor"}) == {}
    assert checkpoint_flags(asked | {"non_persistent_ckpt_type": "local"}) == {}
    assert checkpoint_flags(asked | {"non_persistent_ckpt_type": "global"}) == flag


def test_a_checkpoint_for_one_layout_names_the_flag_that_was_missing():
    megatrons = (
        "(TP, PP) mismatch after resume ((1, 1) vs (2, 1) from checkpoint): not supported for DistributedOptimizer "
        "with sharding type dp_reshardable. Please use `--ckpt-fully-parallel-save` flag during checkpoint saving."
    )

    def load(message: str) -> None:
        raise RuntimeError(message)

    with pytest.raises(FileError, match=r"\(1, 1\) vs \(2, 1\).*--dist-ckpt-optim-fully-reshardable") as raised:
        optimizer.with_clear_resharding(load)(megatrons)
    assert "parallel-save" not in str(raised.value)
    with pytest.raises(RuntimeError, match="something else"):
        optimizer.with_clear_resharding(load)("something else")
    assert optimizer.with_clear_resharding(lambda: 3)() == 3
