"""The command line of a training run and all that happens before Megatron starts; `test_parallel` starts it."""

import dataclasses
import json
import os
import re
import warnings

import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.training.arguments import add_megatron_arguments
from torch.distributed.checkpoint.api import CheckpointException

from composer_megatron import arguments, cpu, train
from composer_megatron.architecture import Architecture
from composer_megatron.arguments import given_flags, parse_options
from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import read_json_lines
from composer_megatron.launch import Launch
from composer_megatron.metrics import MetricsLog, tee
from composer_megatron.pipeline import cut_sequence
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.text.folder import load_text_folder

ARCHITECTURE = Architecture(
    CompositeSequence.parse("2A5M2A3M"), dataclasses.replace(PRESETS["tiny"], num_query_groups=2)
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """`train` sets environment variables and warning filters for its process, which here is everyone's."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")})
    with warnings.catch_warnings():
        yield os.environ


@pytest.fixture
def folder(tmp_path):
    """An architecture and a text of 10 and 2 documents of 100 tokens."""
    ARCHITECTURE.save(tmp_path / "architecture.json")
    text = tmp_path / "text"
    text.mkdir()
    for part, documents in {"train": 10, "valid": 2}.items():
        builder = IndexedDatasetBuilder(str(text / f"{part}.bin"), dtype=DType.optimal_dtype(512))
        for _ in range(documents):
            builder.add_item(torch.arange(100))
            builder.end_document()
        builder.finalize(str(text / f"{part}.idx"))
    (text / "tokenizer.json").write_text('{"é": 1}')
    describe(text)
    return tmp_path


def describe(text, **changes):
    values = {
        "format": "composer-text",
        "version": 1,
        "sources": [],
        "vocab_size": 512,
        "end_of_text": 3,
        "train": {"documents": 10, "tokens": 1000, "bytes": 4000},
        "valid": {
            "documents": 2,
            "tokens": 200,
            "bytes": 800,
            "unigram_nats_per_token": 4.6,
            "unigram_bits_per_byte": 1.6,
        },
    }
    (text / "text.json").write_text(json.dumps(values | changes))


def ours(folder, *more: str) -> list[str]:
    return ["--architecture", str(folder / "architecture.json"), "--text", str(folder / "text"), *more]


def command_line(folder, *more: str) -> dict:
    """What Megatron reads out of the command line, by its own parser's names."""
    argv = [*ours(folder, "--seq-length", "64"), *more]
    return given_flags(train.megatron_command_line(parse_options(argv), processes=8))


def test_the_architecture_becomes_flags(folder):
    flags = command_line(folder)
    wanted = {
        "hybrid_layer_pattern": "**-----**---",
        "hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 16,
        "padded_vocab_size": 512,
        "swiglu": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "position_embedding_type": "rope",
        "rotary_base": 500_000,
        "init_method_std": 0.02,
        "null_tokenizer_eod_id": 3,
        "train_data_path": [str(folder / "text/train")],
        "valid_data_path": [str(folder / "text/valid")],
        "seq_length": 64,
        "max_position_embeddings": 64,
    }
    assert {name: flags.get(name) for name in wanted} == wanted
    assert "untie_embeddings_and_output_weights" not in flags
    untied = dataclasses.replace(ARCHITECTURE.shape, tied_embeddings=False)
    Architecture(ARCHITECTURE.sequence, untied).save(folder / "architecture.json")
    assert command_line(folder)["untie_embeddings_and_output_weights"] is True


def test_the_machine_becomes_flags(folder, monkeypatch):
    monkeypatch.setattr(cpu, "has_gpu", lambda: False)
    flags = command_line(folder)
    assert (flags["distributed_backend"], flags["use_cpu_initialization"], flags.get("bf16")) == ("gloo", True, None)
    monkeypatch.setattr(cpu, "has_gpu", lambda: True)
    flags = command_line(folder)
    assert (flags["distributed_backend"], flags.get("use_cpu_initialization"), flags["bf16"]) == ("nccl", None, True)
    assert "bf16" not in command_line(folder, "--fp32")
    assert command_line(folder, "--fp16").get("bf16") is None


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--lr", "0.5"], "lr", 0.5),
        (["--lr=0.5"], "min_lr", 0.05),
        (["--micro-batch-size", "3"], "micro_batch_size", 3),
        (["--hidden-dropout", "0.1"], "hidden_dropout", 0.1),
        (["--rotary-base", "10000"], "rotary_base", 10_000),
        (["--train-samples", "64"], "train_iters", None),
        (["--lr-warmup-iters", "2"], "lr_warmup_fraction", None),
        (["--squared-relu"], "swiglu", None),
        (["--logging-level", "10"], "logging_level", 10),
        (["--hybrid-layer-pattern", "**---|--**---", "--pipeline-model-parallel-size", "2"], "num_workers", 0),
    ],
)
def test_a_flag_of_the_users_wins(folder, given, name, value, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "has_gpu", lambda: False)
    assert command_line(folder, *given).get(name) == value
    noted = "training another model than the architecture's" in capsys.readouterr().err
    assert noted is (given[0] in ("--rotary-base", "--squared-relu"))


def test_the_pipeline_cut_is_the_cost_models(folder):
    seq_len = command_line(folder)["seq_length"]
    wanted = cut_sequence(ARCHITECTURE, 4, seq_len=seq_len)
    flags = command_line(folder, "--pipeline-model-parallel-size", "4")
    assert [len(stage) for stage in flags["hybrid_layer_pattern"].split("|")] == wanted
    wanted = cut_sequence(ARCHITECTURE, 2, virtual_stages=2, seq_len=seq_len)
    virtual = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
    flags = command_line(folder, *virtual, "--global-batch-size", "64")
    assert [len(stage) for stage in flags["hybrid_layer_pattern"].split("|")] == wanted
    assert "num_virtual_stages_per_pipeline_rank" not in flags  # Megatron refuses it beside a pattern


def test_a_run_folder_becomes_flags(folder):
    flags = command_line(folder, "--run-dir", str(folder / "run"), "--train-iters", "100")
    checkpoints = str(folder / "run/checkpoints")
    assert (flags["save"], flags["load"], flags["save_interval"]) == (checkpoints, checkpoints, 20)
    assert flags["data_cache_path"] == str(folder / "run/cache")
    assert not (folder / "run").exists()


def test_a_distributed_optimizer_is_saved_for_any_layout(folder):
    assert "dist_ckpt_optim_fully_reshardable" not in command_line(folder)
    assert command_line(folder, "--use-distributed-optimizer")["dist_ckpt_optim_fully_reshardable"] is True


def test_all_our_flags_are_megatrons(folder):
    """The names are checked by the parser; here, that no store of ours is a default that Megatron dropped."""
    parser = arguments._Parser(allow_abbrev=False)
    add_megatron_arguments(parser)
    run = ["--run-dir", str(folder / "run")]
    line = train.megatron_command_line(parse_options(ours(folder, "--seq-length", "64", *run)))
    assert parser.parse_known_args(line)[1] == []


def fails(capsys, *argv: str, status: int = 2) -> str:
    """Run, and give the one message."""
    assert train.main(list(argv)) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("error:") == 1
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pipeline-model-parallel-size", "13"], "13 pipeline stages for the 12 blocks of 2A5M2A3M"),
        (
            ["--pipeline-model-parallel-size", "7", "--num-virtual-stages-per-pipeline-rank", "2"],
            "14 pipeline stages for the 12 blocks",
        ),
        (["--num-virtual-stages-per-pipeline-rank", "0"], "expected at least 1"),
        (["--tensor-model-parallel-size", "3"], "tensor_parallel=3 does not divide num_attention_heads=4"),
        (["--tensor-model-parallel-size", "4"], "tensor_parallel=4 does not divide num_query_groups=2"),
        (["--seq-length", "200"], "valid has 200 tokens, fewer than a sequence of 200 and its next"),
        (["--trainiters", "5"], "did you mean --train-iters?"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["surplus"], "unknown argument 'surplus'"),
        (["--mock-data"], "--text and --mock-data: give one source of data"),
        (["--run-dir", "run", "--rotary-base", "10000"], "--rotary-base 10000 (the architecture has 500000)"),
        (["--run-dir", "run", "--hybrid-layer-pattern", "**----"], "another model than the architecture's"),
    ],
)
def test_wrong_requests(folder, capsys, given, message):
    assert message in fails(capsys, *ours(folder, "--seq-length", "64"), *given)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--trainiters", "5"), "did you mean --train-iters?"),
        (("--context-parallel-size", "2"), "= 4 ranks do not divide 2 processes"),
        (("--num-layers", "5"), "--num-layers does not go with an architecture file"),
    ],
)
def test_a_dry_run_checks_every_flag(folder, extra, message):
    numbers = {"processes": 2, "tensor_parallel": 2, "pipeline_parallel": 1, "steps": 5, "micro_batch_size": 2}
    numbers |= {"global_batch_size": 4, "seq_len": 64, "learning_rate": 1e-3}
    places = {"architecture": folder / "architecture.json", "text": folder / "text", "run_dir": folder / "run"}
    Launch(**places, **numbers, extra=("--log-throughput",)).check()
    with pytest.raises(UsageError, match=re.escape(message)):
        Launch(**places, **numbers, extra=extra).check()
    assert not (folder / "run").exists()


def test_missing_data(folder, capsys):
    architecture = ["--architecture", str(folder / "architecture.json")]
    assert "no data: give --text" in fails(capsys, *architecture)
    assert f"there is no {folder}/none.idx" in fails(capsys, *architecture, "--data-path", "0.5", f"{folder}/none")
    assert "required: --architecture" in fails(capsys, "--text", str(folder / "text"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: describe(text, vocab_size=513), "has 513 token ids, shape 'tiny' has vocab_size=512"),
        (lambda text: describe(text, version=2), "version"),
        (lambda text: describe(text, train={}), "text.json: a value is missing"),
        (lambda text: (text / "text.json").write_text("{"), "text.json"),
        (lambda text: (text / "valid.bin").unlink(), "valid.bin"),
        (lambda text: (text / "valid.bin").write_bytes(b"cut"), "valid.bin"),
        (lambda text: text.rename(text.parent / "moved"), "is no folder"),
    ],
)
def test_bad_text_folders(folder, capsys, spoil, message):
    spoil(folder / "text")
    status = 2 if "513" in message else 1
    assert message in fails(capsys, *ours(folder, "--seq-length", "64"), status=status)


@pytest.mark.parametrize("content", [None, "{", '{"format": "composer-architecture", "version": 9}'])
def test_bad_architecture_files(folder, capsys, content):
    path = folder / "architecture.json"
    path.unlink() if content is None else path.write_text(content)
    assert str(path) in fails(capsys, *ours(folder), status=1)


def test_debug_shows_where_an_error_came_from(folder):
    with pytest.raises(UsageError, match="13 pipeline stages"):
        train.main(ours(folder, "--seq-length", "64", "--pipeline-model-parallel-size", "13", "--debug"))


def test_other_ranks_let_the_first_one_speak(folder, capsys, monkeypatch, environment):
    waited = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    environment["RANK"] = "1"
    assert "13 pipeline stages" in fails(
        capsys, *ours(folder, "--seq-length", "64", "--pipeline-model-parallel-size", "13")
    )
    assert waited == [train._PATIENCE]


def test_help_names_our_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--architecture", "--text", "--run-dir", "--fp32", "--debug"))
    assert "win over" in printed


def test_without_megatron_the_extra_is_named(folder, capsys, monkeypatch):
    def missing(name):
        raise train.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(train.importlib.metadata, "version", missing)
    assert 'pip install "composer-megatron[train]"' in fails(capsys, *ours(folder), status=1)
    monkeypatch.setattr(train.importlib.metadata, "version", lambda name: "0.17.1")
    assert "0.17.1 is too old" in fails(capsys, *ours(folder), status=1)


def test_a_run_folder_keeps_to_its_model(folder):
    run, tokenizer = folder / "run", load_text_folder(folder / "text").tokenizer
    train._check_run_dir(run, ARCHITECTURE, tokenizer)
    train._fill_run_dir(run, ARCHITECTURE, tokenizer)
    train._fill_run_dir(run, ARCHITECTURE, tokenizer)
    train._check_run_dir(run, ARCHITECTURE, tokenizer)
    assert Architecture.load(run / "architecture.json") == ARCHITECTURE
    assert (run / "tokenizer.json").read_text() == '{"é": 1}'
    with pytest.raises(UsageError, match="run of another architecture"):
        train._check_run_dir(run, ARCHITECTURE.baseline(), tokenizer)
    tokenizer.write_text("{}")
    with pytest.raises(UsageError, match="run with another tokenizer"):
        train._check_run_dir(run, ARCHITECTURE, tokenizer)


@pytest.mark.parametrize("on_ranks", [False, True])
def test_unloadable_checkpoints_are_named(on_ranks):
    def load(*_, **__):
        error = KeyError("decoder.final_norm.weight")
        raise CheckpointException("read", {0: (error, None)}) if on_ranks else error

    with pytest.raises(FileError, match=r"^cannot load run/checkpoints: KeyError: 'decoder.final_norm.weight'; do so$"):
        train._with_clear_errors(load, "load run/checkpoints", "do so")()
    assert train._with_clear_errors(lambda *a, **k: (a, k), "load", "do so")(1, b=2) == ((1,), {"b": 2})


@pytest.mark.parametrize("spec", [["no_such_module", "spec"], ["composer_megatron.specs", "no_such_name"]])
def test_a_spec_that_is_not_there(spec):
    with pytest.raises(UsageError, match=r"--spec .* there is no such module"):
        train._check_spec(spec)
    train._check_spec(["composer_megatron.specs", "composite_stack_spec"])


def log(path, resumed_at=0) -> MetricsLog:
    return MetricsLog(path, resumed_at)


def test_metrics_are_lines_of_finite_floats_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = log(path)
    metrics.add_scalar("lm loss", torch.tensor([8.5]), 1)
    metrics.add_scalar("lm loss vs samples", 8.5, 32)
    metrics.add_scalar("lm loss", 9.5, 1)
    metrics.add_scalar("grad-norm", float("inf"), 1)
    metrics.add_scalar("batch-size", 4, 1)
    metrics.flush()
    metrics.close()
    lines = read_json_lines(path)
    assert [(line["iteration"], line["name"], line["value"]) for line in lines] == [
        (1, "lm loss", 8.5),
        (1, "batch-size", 4.0),
    ]
    assert all(type(line["value"]) is float and line["time"] > 1e9 for line in lines)


def test_metrics_of_a_run_that_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = log(path)
    for iteration in range(1, 6):
        first.add_scalar("lm loss", iteration, iteration)
    with path.open("a") as file:
        file.write('{"iteration": 6, "na')  # torn by a kill
    second = log(path, resumed_at=3)
    assert [line["iteration"] for line in read_json_lines(path)] == [1, 2, 3]
    for iteration in range(3, 6):
        second.add_scalar("lm loss", 10 * iteration, iteration)
    assert [line["value"] for line in read_json_lines(path)] == [1, 2, 3, 40, 50]


def test_metrics_go_to_tensorboard_too(tmp_path):
    seen = []

    class Writer:
        def add_scalar(self, *args):
            seen.append(args)

        def add_text(self):
            return "text"

    metrics = log(tmp_path / "metrics.jsonl")
    writer = tee(metrics, Writer())
    writer.add_scalar("lm loss", 1.5, 2)
    writer.add_scalar("lm loss vs samples", 1.5, 64)
    assert seen == [("lm loss", 1.5, 2), ("lm loss vs samples", 1.5, 64)]
    assert writer.add_text() == "text"
    assert [line["value"] for line in read_json_lines(metrics.path)] == [1.5]
    assert tee(metrics, None) is metrics
