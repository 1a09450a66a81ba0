"""``composer-megatron import``, and what comes after: a training run starts from the imported weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason='needs pip install "composer-megatron[hf]"')

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from composer_megatron import cli, cpu  # noqa: E402
from composer_megatron.architecture import Architecture  # noqa: E402
from composer_megatron.files import read_json_lines  # noqa: E402

torch.set_num_threads(1)

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,  # large: a fresh model's loss is log(64), this one's is far from it
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    model.save_pretrained(folder)
    return model, folder


def test_the_command_says_what_it_made(llama, tmp_path, capsys):
    cli.main(["import", str(llama[1]), str(tmp_path / "run")])
    said = capsys.readouterr().out
    architecture = Architecture.load(tmp_path / "run/architecture.json")
    assert f"{architecture.params_total:,} parameters, float32: written to {tmp_path / 'run'}" in said
    assert "no tokenizer.json came with it" in said
    cli.main(["import", str(llama[1]), str(tmp_path / "other"), "--json"])
    assert json.loads(capsys.readouterr().out)["params_total"] == architecture.params_total


def test_the_command_refuses_with_one_message(llama, tmp_path, capsys):
    for command, status in (
        (["import", str(llama[1]), str(tmp_path)], 2),
        (["import", str(tmp_path), str(tmp_path / "run")], 1),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert ended.value.code == status
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(cpu.has_gpu(), reason="trains on the CPU; a GPU machine would use nccl")
def test_training_starts_from_the_imported_weights_and_goes_on_from_its_own(llama, tmp_path):
    """Every sequence is the same one, so that transformers can say what the first loss is."""
    model, folder = llama
    cli.main(["import", str(folder), str(tmp_path / "imported")])
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=DType.optimal_dtype(64))
    builder.add_item(torch.full((2000,), 7))
    builder.end_document()
    builder.finalize(str(tmp_path / "data.idx"))
    tokens = torch.full((1, 17), 7)
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:]).item()
    assert abs(wanted - torch.log(torch.tensor(64.0))) > 0.5  # not a fresh model's

    def losses(iterations: int) -> dict[int, float]:
        flags = {
            "--architecture": tmp_path / "imported/architecture.json",
            "--run-dir": tmp_path / "run",
            "--pretrained-checkpoint": tmp_path / "imported/checkpoints",
            "--data-path": tmp_path / "data",
            "--split": "100,0,0",
            "--train-iters": iterations,
            "--lr": 0.01,
            "--seq-length": 16,
            "--micro-batch-size": 1,
            "--global-batch-size": 2,
            "--log-interval": 1,
            "--eval-iters": 0,
        }
        arguments = [str(part) for flag in flags.items() for part in flag]
        done = subprocess.run(
            [sys.executable, "-m", "composer_megatron.train", *arguments],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        lines = read_json_lines(tmp_path / "run/metrics.jsonl")
        return {line["iteration"]: line["value"] for line in lines if line["name"] == "lm loss"}

    first = losses(3)
    assert first[1] == pytest.approx(wanted, rel=1e-5)
    assert first[3] < first[1]  # Megatron's first step has a learning rate of 0
    again = losses(4)  # the same command, but longer: from the run's own checkpoint, not from the imported one
    assert again == first | {4: again[4]}
    assert again[4] < first[3]
