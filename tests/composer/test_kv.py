"""What decoding keeps: the counts are those of the cache that is allocated, and the paper's ratios come out."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from composer_megatron import cli
from composer_megatron.architecture import Architecture
from composer_megatron.commands.kv import models
from composer_megatron.errors import UsageError
from composer_megatron.inference.cache import cache_bytes, make_cache
from composer_megatron.inference.limits import PREFILL_TOKENS
from composer_megatron.inference.weights import Block, Weights
from composer_megatron.kv import fitting_batch, fixed_bytes, keeping, mean_ratio, request_bytes
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from tests.composer.caching_allocator import WORKSPACE, peak

ROOT = Path(__file__).parents[2]


def of(text: str, shape: str = "1b") -> Architecture:
    return Architecture(CompositeSequence.parse(text), PRESETS[shape])


def allocated(architecture: Architecture, rows: int, capacity: int) -> int:
    """Bytes of the cache that the engine would allocate, on the meta device."""
    shape, nothing = architecture.shape, torch.empty(0, device="meta", dtype=torch.bfloat16)
    windows = {"A": None, "W": shape.window}
    blocks = tuple(
        Block(nothing, nothing, nothing, letter in windows, windows.get(letter)) for letter in architecture.sequence
    )
    sizes = (shape.num_attention_heads, shape.num_query_groups, shape.head_dim, 1e-5)
    return cache_bytes(make_cache(Weights(nothing, blocks, nothing, nothing, *sizes, nothing), rows, capacity))


@pytest.mark.parametrize("shape", ["350m", "1b", "3b", "8b", "70b"])
@pytest.mark.parametrize("text", ["2A4M", "(AM)x16", "3W1A4M", "2M"])
def test_counts_are_what_the_cache_allocates(shape, text):
    architecture = of(text, shape)
    for context in (100, 1024, 5000):  # below, at and past the window
        assert allocated(architecture, 3, context) == 3 * architecture.state_bytes(context)


def test_the_papers_ratios():
    rows = [
        keeping(name, of(text), [4096], []) for name, text in (("llama", "(AM)x16"), ("a", "9A18M"), ("b", "10A19M"))
    ]
    assert [row.bytes_per_token for row in rows] == [32_768, 18_432, 20_480]
    assert [row.ratio for row in rows] == [1, 16 / 9, 16 / 10]
    assert mean_ratio(rows) == pytest.approx(1.6889, abs=5e-5)
    assert mean_ratio(rows[:1]) is None
    assert keeping("none", of("2M"), [], []).ratio is None


@pytest.mark.parametrize("text", ["(AM)x16", "2A4M", "3W1A4M"])
@pytest.mark.parametrize("context", [512, 32_768])
def test_a_batch_fits_and_one_more_does_not(text, context):
    architecture, memory = of(text), 80 * 10**9
    batch = fitting_batch(architecture, context, memory)
    needed = fixed_bytes(architecture, context) + batch * request_bytes(architecture, context)
    assert needed <= memory < needed + request_bytes(architecture, context)
    assert batch * architecture.state_bytes(context) > 0.75 * (
        memory - fixed_bytes(architecture, context)
    )  # mostly cache


CUDA = 801_964_032
"""Bytes that CUDA held beside PyTorch's allocator on an H100 and an H200 (driver 580, PyTorch 2.11.0)."""


@pytest.mark.parametrize(
    ("shape", "batch", "context", "workspaces", "used"),
    [
        ("1b", 1088, 2048, 0, 77_213_794_304),
        ("1b", 68, 32_768, 1, 79_002_664_960),
        ("350m", 1283, 2048, 0, 78_188_969_984),
        ("350m", 80, 32_768, 1, 78_795_046_912),
        ("1b", 1989, 2048, 0, 138_234_626_048),
        ("1b", 125, 32_768, 1, 140_237_406_208),
    ],
)
def test_the_allocators_model_is_what_was_measured(shape, batch, context, workspaces, used):
    """To the byte: the first two batches of processes on an H100 and an H200, the second beside the first's workspace.

    They ran one prompt, with weights that nothing was copied of.
    """
    expected = peak(of("2M", shape).baseline(), batch, context, 1, copies=False) + CUDA + workspaces * WORKSPACE
    assert used == expected


def test_the_allocators_model_is_what_whole_batches_took():
    """24 batches of `kv --check`, one after the other; a trial leaves up to two workspaces of cuBLAS to the next."""
    file = ROOT / "benchmarks/results/nvidia-h200/kv-80.json"
    architectures = {(row.shape.name, name): row for name, row in models((), ("350m", "1b", "3b", "8b"))}
    trials = json.loads(file.read_text())["trials"]
    assert len(trials) == 24
    for trial in trials:
        architecture, context = architectures[trial["shape"], trial["model"]], trial["context"]
        prompts = max(1, min(trial["batch"], PREFILL_TOKENS // context))
        expected = peak(architecture, trial["batch"], context, prompts, copies=True) + CUDA
        assert abs(trial["used"] - expected) <= 2 * WORKSPACE + 5 * 10**6, trial["said"]


@pytest.mark.parametrize("memory", [80 * 10**9, 141 * 10**9])
@pytest.mark.parametrize("context", [512, 2048, 8192, 32_768, 131_072])
def test_what_the_allocator_takes_fits(memory, context):
    """Of every preset and model; with a whole pass of prompts, and a run's copies."""
    for _, architecture in models((), ("350m", "1b", "3b", "8b")):
        batch = fitting_batch(architecture, context, memory)
        prompts = max(1, min(batch, PREFILL_TOKENS // context))
        assert peak(architecture, batch, context, prompts, copies=True) + CUDA <= memory, architecture.shape.name


def test_weights_that_do_not_fit_leave_no_room():
    assert fitting_batch(of("(AM)x80", "70b"), 512, 80 * 10**9) == 0


@pytest.mark.parametrize(("context", "memory", "message"), [(0, 1, "context=0"), (1, 0, "memory=0")])
def test_impossible_requests(context, memory, message):
    with pytest.raises(UsageError, match=message):
        fitting_batch(of("2A4M"), context, memory)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        cli.main(["kv", *arguments])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def test_the_table_for_programs_and_for_people(capsys, tmp_path):
    status, out, _ = run(capsys, "--shapes", "1b", "--contexts", "512", "--memory", "80", "--json")
    found = json.loads(out)
    assert status == 0
    assert [(row["model"], row["bytes_per_token"]) for row in found["rows"]] == [
        ("llama", 32_768),
        ("stacked", 18_432),
        ("stretched", 20_480),
    ]
    of("9A18M2W").save(tmp_path / "architecture.json")
    status, out, _ = run(capsys, str(tmp_path / "architecture.json"), "8M", "--shapes", "1b", "--memory", "80")
    assert status == 0
    assert "1b: Llama over Composite 1.455 in the mean" in out  # 16 / (9 + 2), and 8M keeps nothing
    assert "32,768" in out


def test_a_sequence_that_is_far_smaller_than_llama_says_so_and_stands_in_no_mean(capsys):
    """2A4M keeps an eighth of what 32 blocks of Llama keep, which says nothing about growing it."""
    say = "2A4M: 6 blocks as given, beside the 32 of 1b's Llama; `composer-megatron extrapolate` grows it"
    _, out, _ = run(capsys, "2A4M", "--shapes", "1b")
    assert say in out
    assert "in the mean" not in out
    _, out, _ = run(capsys, "2A4M", "9A18M", "--shapes", "1b")
    assert say in out
    assert out.count("as given") == 1
    assert "1b: Llama over Composite 1.778 in the mean" in out
    _, out, _ = run(capsys, "8A8M", "--shapes", "1b")  # half as many blocks are not far fewer
    assert "as given" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("2Q",), "unknown primitive 'Q'"), (("--contexts", "0"), "context=0"), (("--shapes", "1B"), "did you mean '1b'")],
)
def test_mistakes(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_check_needs_a_gpu(capsys):
    status, _, err = run(capsys, "--check")
    assert status == 2
    (said,) = err.splitlines()
    assert "--check runs on a CUDA GPU" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("used", "others", "status"),
    [(70 * 10**9, 0, 0), (70 * 10**9, 5 * 10**9, 0), (81 * 10**9, 0, 1), (None, 0, 1), (None, 30 * 10**9, 1)],
)
def test_a_check_says_what_was_tried(capsys, monkeypatch, used, others, status):
    """With a GPU of cardboard: batches that fit, that need more than was said, that do not fit, alone or not."""
    from composer_megatron.inference import fit

    def try_batch(architecture, weights, batch, context):
        held = batch * architecture.state_bytes(context)
        return fit.Trial(batch, context, held, held, used, others)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=85 * 10**9))
    monkeypatch.setattr(fit, "weights_for", lambda architecture: None)
    monkeypatch.setattr(fit, "try_batch", try_batch)
    found, out, err = run(capsys, "2A4M", "--shapes", "1b", "--contexts", "512", "--check", "--json")
    assert found == status
    found = json.loads(out)
    trials = found["trials"]
    assert found["environment"]["packages"]["torch"]
    assert len(found["date"]) == len("2026-11-23")
    assert [(trial["model"], trial["memory"], trial["holds"]) for trial in trials] == [
        ("llama", 80 * 10**9, status == 0),
        ("2A4M", 80 * 10**9, status == 0),  # 141 GB this GPU does not have
    ]
    assert ("2 of 2 batches did not fit" in err) == (status == 1)
    assert "1b llama: 4," in err
    assert ("other processes" in err) == bool(others)
    if others and status:
        assert "other processes hold 30.0 GB and leave 55.0" in err
        assert "other processes held up to 30.0 GB of this GPU, try without them" in err


def test_a_check_cut_short_keeps_its_trials(tmp_path, capsys, monkeypatch):
    from composer_megatron.inference import fit

    def try_batch(architecture, weights, batch, context):
        if (tmp_path / "found.json").exists():
            raise KeyboardInterrupt
        return fit.Trial(batch, context, 7, 7, 10**9, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=85 * 10**9))
    monkeypatch.setattr(fit, "weights_for", lambda architecture: None)
    monkeypatch.setattr(fit, "try_batch", try_batch)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        run(capsys, "2A4M", "--shapes", "1b", "--contexts", "512", "--check", "--output", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(trial["model"], trial["used"]) for trial in found["trials"]] == [("llama", 10**9)]
    assert found["date"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_is_said_to_fit_fits(capsys):
    """In 20 GB, if other programs leave that much."""
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < 21:
        pytest.skip(f"needs 21 GB of GPU memory; {free:.0f} GB are free")
    status, out, err = run(
        capsys, "--shapes", "350m", "--contexts", "512", "8192", "--memory", "20", "--check", "--json"
    )
    if status and "other processes held" in err:
        pytest.skip(f"the GPU is not this test's own: {err.strip().splitlines()[-1]}")
    assert status == 0, err
    trials = json.loads(out)["trials"]
    assert len(trials) == 6
    assert all(trial["holds"] for trial in trials)
