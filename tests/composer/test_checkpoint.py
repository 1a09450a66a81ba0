"""Loading a run: whatever layout saved it, the weights are those drawn; what is damaged or does not fit is said."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from composer_megatron import cli
from composer_megatron.architecture import Architecture
from composer_megatron.checkpoint import complete_iterations, find_checkpoint, load_run
from composer_megatron.errors import FileError, UsageError
from composer_megatron.model import build_model, end_single_process
from composer_megatron.sequence import CompositeSequence

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_group():
    """Start without the process group that an earlier test may have left."""
    if torch.distributed.is_initialized():
        end_single_process()


def drawn(run: Path, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The weights that the run was saved with: they depend on the seed and their names alone."""
    model = build_model(Architecture.load(run / "architecture.json"), max_sequence_length=1, dtype=dtype)
    return dict(model.named_parameters())


def change_architecture(run: Path, **changes) -> None:
    found = Architecture.load(run / "architecture.json")
    sequence = CompositeSequence.parse(changes.pop("sequence", str(found.sequence)))
    Architecture(sequence, dataclasses.replace(found.shape, **changes)).save(run / "architecture.json")


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "iter_0000007"


@pytest.mark.parametrize("layout", ["plain", "tensor", "pipeline", "mlp"])
def test_every_layout_loads_exactly(runs, layout):
    with load_run(runs[layout]) as run:
        loaded = dict(run.model.named_parameters())
        wanted = drawn(runs[layout])
        assert loaded.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(loaded[name], value), name
        assert sum(map(torch.numel, loaded.values())) == run.architecture.params_total


def test_the_saved_type_is_kept_or_changed_on_request(runs):
    with load_run(runs["bf16"]) as run:
        kept = dict(run.model.named_parameters())
    with load_run(runs["bf16"], dtype=torch.float32) as run:
        for name, value in run.model.named_parameters():
            assert kept[name].dtype == torch.bfloat16
            assert torch.equal(value, kept[name].float()), name


def test_what_a_run_says_of_itself(runs):
    with load_run(runs["plain"]) as run:
        assert (run.path, run.iteration, run.sequence_length) == (runs["plain"], 7, 32)
        assert run.architecture == Architecture.load(runs["plain"] / "architecture.json")
        assert run.require_tokenizer().id_to_token(run.end_of_text) == "<|endoftext|>"
        assert not run.model.training
        assert not any(parameter.requires_grad for parameter in run.model.parameters())
        ids = torch.arange(6)[None]
        logits = run.model(ids, ids, None)
    with load_run(runs["plain"] / "checkpoints", 7, sequence_length=50) as run:
        assert (run.path, run.sequence_length) == (runs["plain"], 50)
        assert torch.equal(run.model(ids, ids, None), logits)


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/iter_0000007"])
def test_a_run_is_found_by_any_of_its_folders(runs, place, monkeypatch):
    wanted = (runs["plain"], 7, checkpoint(runs["plain"]))
    assert find_checkpoint(runs["plain"] / place) == wanted
    monkeypatch.chdir(runs["plain"] / place)
    run_dir, iteration, folder = find_checkpoint(Path())
    assert (run_dir.resolve(), iteration, folder.resolve()) == wanted


def test_the_process_group_ends_with_the_run(runs):
    for _ in range(2):
        with load_run(runs["plain"]):
            assert torch.distributed.is_initialized()
        assert not torch.distributed.is_initialized()


def test_a_process_group_that_was_there_stays(runs):
    build_model(Architecture.load(runs["plain"] / "architecture.json"), max_sequence_length=1)
    with load_run(runs["plain"]):
        pass
    assert torch.distributed.is_initialized()


def test_loading_says_nothing(runs):
    """In a fresh process: no remark on missing packages, and no environment variable is needed."""
    program = f"from composer_megatron.checkpoint import load_run\nwith load_run({str(runs['plain'])!r}): pass"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_newest_complete_and_older_checkpoints(run_dir):
    shutil.copytree(checkpoint(run_dir), run_dir / "checkpoints/iter_0000009")
    shutil.copytree(checkpoint(run_dir), run_dir / "checkpoints/iter_0000012")
    (run_dir / "checkpoints/iter_0000012/metadata.json").unlink()
    assert complete_iterations(run_dir / "checkpoints") == [7, 9]
    assert find_checkpoint(run_dir).iteration == 7  # the tracker says so
    assert find_checkpoint(run_dir, 9).folder.name == "iter_0000009"
    (run_dir / "checkpoints/latest_checkpointed_iteration.txt").write_text("12\n")
    with pytest.raises(FileError, match=r"iter_0000012 is incomplete, .*complete iterations: 7, 9"):
        find_checkpoint(run_dir)


def damage_tracker(run):
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("seven")


def damage_weights(run):
    for file in checkpoint(run).glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)


DAMAGE = {
    "no run folder": (shutil.rmtree, "is no folder: expected the folder of a training run"),
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints is missing: .*saved any yet"),
    "no tracker": (
        lambda run: (run / "checkpoints/latest_checkpointed_iteration.txt").unlink(),
        "latest_checkpointed_iteration.txt is missing, .*complete iterations: 7",
    ),
    "torn tracker": (damage_tracker, "says 'seven'; expected an iteration's number; .*complete iterations: 7"),
    "half-written": (lambda run: (checkpoint(run) / "metadata.json").unlink(), "is incomplete.*no complete checkpoint"),
    "removed": (lambda run: shutil.rmtree(checkpoint(run)), "iter_0000007 is missing; .*no complete checkpoint"),
    "torn weights": (damage_weights, "cannot read the checkpoint .*iter_0000007: EOFError: ; restore it"),
    "torn index": (
        lambda run: os.truncate(checkpoint(run) / ".metadata", 100),
        "cannot read the checkpoint .*iter_0000007",
    ),
    "lost weights": (
        lambda run: [file.unlink() for file in checkpoint(run).glob("*.distcp")],
        "cannot read the checkpoint .*iter_0000007: FileNotFoundError: .*distcp",
    ),
    "no architecture": (lambda run: (run / "architecture.json").unlink(), "architecture.json is no file"),
    "no JSON": (lambda run: (run / "architecture.json").write_text("{"), "architecture.json is not an architecture"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_one_clear_error(run_dir, how):
    damage, message = DAMAGE[how]
    damage(run_dir)
    with pytest.raises(FileError, match=message):
        load_run(run_dir)
    assert not torch.distributed.is_initialized()


OTHER_MODELS = {
    "other heads, tensors of the same shapes": (
        {"num_attention_heads": 3, "num_query_groups": 1, "head_dim": 16},
        r"num_attention_heads=6 \(here 3\), num_query_groups=2 \(here 1\), kv_channels=8 \(here 16\)",
    ),
    "other rotary base": ({"rope_theta": 500_000}, r"rotary_base=1000 \(here 500000\)"),
    "other epsilon": ({"norm_epsilon": 1e-5}, r"layernorm_epsilon=0.0001 \(here 1e-05\)"),
    "longer": ({"sequence": "1M2A2M1A2M"}, "lacks decoder.layers.7.mlp"),
    "shorter": ({"sequence": "1M2A2M1A"}, "has decoder.layers.6.mlp.*, too"),
    "other order": ({"sequence": "2A1M2M1A1M"}, "lacks decoder.layers.0.*and 9 more"),
    "wider": ({"ffn_hidden_size": 64}, r"linear_fc1.weight is \(96, 32\) there and \(128, 32\) here"),
    "tied": ({"tied_embeddings": True}, "has output_layer.weight, too"),
    "smaller vocabulary": ({"vocab_size": 295}, r"weight is \(300, 32\) there and \(295, 32\) here"),
    "vocabulary too small for the tokenizer": ({"vocab_size": 200}, "token ids, the model only 200 embeddings"),
}


@pytest.mark.parametrize("how", OTHER_MODELS)
def test_another_model_than_the_checkpoints_is_refused(run_dir, how):
    changes, message = OTHER_MODELS[how]
    change_architecture(run_dir, **changes)
    with pytest.raises(FileError, match=message):
        load_run(run_dir)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("arguments", [("generate", "--prompt", "x"), ("eval",)])
def test_another_model_than_the_checkpoints_is_one_message_of_the_commands(
    run_dir, text_folder, capsys, arguments: tuple[str, ...]
):
    change_architecture(run_dir, sequence="1M2A2M1A2M")
    verb, *rest = arguments
    texts = ["--text", str(text_folder)] if verb == "eval" else []
    with pytest.raises(SystemExit) as end:
        cli.main([verb, str(run_dir), *rest, *texts])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "lacks decoder.layers.7.mlp" in said
    assert "Traceback" not in said


def test_another_order_of_blocks_is_refused_by_the_flags(runs, tmp_path):
    """The pipeline run was saved with its pattern among the flags."""
    run = Path(shutil.copytree(runs["pipeline"], tmp_path / "run"))
    change_architecture(run, sequence="2A1M2M1A1M")
    with pytest.raises(FileError, match=r"hybrid_layer_pattern=-\*\*--\*- \(here \*\*---\*-\)"):
        load_run(run)


def test_wrong_requests(runs):
    with pytest.raises(FileError, match="iter_0000008 is missing; name one of the complete iterations: 7"):
        load_run(runs["plain"], 8)
    with pytest.raises(UsageError, match=r"iteration=8 beside .*iter_0000007: give one"):
        load_run(checkpoint(runs["plain"]), 8)
    with pytest.raises(UsageError, match="sequence_length=0; expected at least 1"):
        load_run(runs["plain"], sequence_length=0)


def test_a_checkpoint_that_does_not_say_its_length(runs):
    with pytest.raises(UsageError, match="give sequence_length"):
        load_run(runs["unsaid"])
    with load_run(runs["unsaid"], sequence_length=16) as run:
        assert run.sequence_length == 16


def test_a_run_without_a_tokenizer(run_dir):
    (run_dir / "tokenizer.json").unlink()
    with load_run(run_dir) as run:
        assert run.tokenizer is None
        with pytest.raises(FileError, match=r"tokenizer\.json is missing, so this run cannot read text"):
            _ = run.end_of_text


def test_a_run_of_megatrons_training_loop(runs, text_folder, tmp_path):
    """Two processes in a pipeline, two steps: every checkpoint loads, with all that Megatron writes beside weights."""
    shape = Architecture.load(runs["pipeline"] / "architecture.json").shape
    Architecture(CompositeSequence.parse("1A2M1A"), shape).save(tmp_path / "given.json")
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "composer_megatron.train"]
    folders = ["--architecture", tmp_path / "given.json", "--text", text_folder, "--run-dir", tmp_path / "run"]
    steps = ["--train-iters", 2, "--lr", 1e-2, "--save-interval", 1, "--eval-iters", 1, "--eval-interval", 2]
    layout = ["--pipeline-model-parallel-size", 2, "--seq-length", 24, "--micro-batch-size", 1]
    done = subprocess.run(
        [sys.executable, *program, *map(str, [*folders, *steps, *layout])],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    weights = {}
    for iteration in (1, 2):
        with load_run(tmp_path / "run", iteration) as run:
            assert (run.iteration, run.sequence_length) == (iteration, 24)
            weights[iteration] = torch.cat([value.flatten() for value in run.model.parameters()])
    change = (weights[1] - weights[2]).abs()
    assert 0 < change.max() < 0.1  # a step of Adam's is about the learning rate
