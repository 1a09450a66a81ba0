"""A tiny text folder and tiny training runs, for the tests of what comes after training."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import Shape
from composer_megatron.text.preprocess import preprocess

ROOT = Path(__file__).parents[2]
SEQUENCE_LENGTH = 32
SHAPE = Shape(
    name="test",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=8,
    vocab_size=300,
    tied_embeddings=False,
    baseline_pairs=2,
    rope_theta=1000,
    norm_epsilon=1e-4,
    init_std=0.4,  # large: attention must matter to the logits, and the likeliest token must change along a text
)
# Starts and ends with an MLP, so that places among the attention blocks differ from places among all blocks.
ARCHITECTURE = Architecture(CompositeSequence.parse("1M2A2M1A1M"), SHAPE)
TIED = dataclasses.replace(ARCHITECTURE, shape=dataclasses.replace(SHAPE, tied_embeddings=True))
FLAGS = {
    "seq_length": SEQUENCE_LENGTH,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 8,
    "rotary_base": 1000,
    "rotary_percent": 1.0,
    "layernorm_epsilon": 1e-4,
}


class Job(NamedTuple):
    """A run to save: a freshly drawn model, as two processes of Megatron's save it."""

    architecture: Architecture
    pattern: str = "-**--*-"
    tensor_parallel: int = 1
    dtype: str = "float32"
    flags: dict = FLAGS


JOBS = {
    "plain": Job(ARCHITECTURE),
    "tensor": Job(ARCHITECTURE, tensor_parallel=2),
    "pipeline": Job(TIED, pattern="-*|*--*-", flags=FLAGS | {"hybrid_layer_pattern": "-*|*--*-"}),
    "bf16": Job(TIED, dtype="bfloat16"),
    "mlp": Job(dataclasses.replace(TIED, sequence=CompositeSequence.parse("2M")), pattern="--"),
    "unsaid": Job(ARCHITECTURE, flags={}),
}


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A text folder with documents from one token to several sequences long; its source is ``../documents.jsonl``."""
    folder = tmp_path_factory.mktemp("text")
    documents = ("".join(f"{step * number} Äpfel, " for step in range(number % 25)) + "!" for number in range(60))
    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    (folder / "documents.jsonl").write_text("".join(lines), encoding="utf-8")
    preprocess([folder / "documents.jsonl"], folder / "text", vocab_size=290, valid_fraction=0.3, workers=1)
    return folder / "text"


@pytest.fixture(scope="session")
def runs(text_folder, tmp_path_factory) -> dict[str, Path]:
    """The run folders of `JOBS`, by name. Tests change copies of them only."""
    folder = tmp_path_factory.mktemp("runs")
    for name, job in JOBS.items():
        job.architecture.save(folder / name / "architecture.json")
        shutil.copy(text_folder / "tokenizer.json", folder / name)
    jobs = [
        job._asdict() | {"architecture": None, "folder": str(folder / name), "iteration": 7}
        for name, job in JOBS.items()
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("save_runs.py")), json.dumps(jobs)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: folder / name for name in JOBS}


@pytest.fixture
def run_dir(runs, tmp_path) -> Path:
    """A copy of the plain run, to be damaged."""
    return Path(shutil.copytree(runs["plain"], tmp_path / "run"))
