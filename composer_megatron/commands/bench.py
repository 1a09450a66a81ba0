"""``bench training`` and ``bench kernels``: measure on this machine."""

from __future__ import annotations

from pathlib import Path

from composer_megatron.display import console, print_json, print_verdicts
from composer_megatron.errors import ComposerError
from composer_megatron.files import read_json


def bench_training(
    *,
    shapes: tuple[str, ...] = (),
    models: tuple[str, ...] = (),
    backends: tuple[str, ...] = (),
    lengths: tuple[int, ...] = (),
    step_tokens: int | None = None,
    quick: bool = False,
    budget: float | None = None,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Training throughput of Llama and Composites on several backends, interleaved; needs a checkout of the source.

    Args:
        shapes: Presets or JSON files; 1b by default.
        models: Of llama, stacked, stretched and matched (stacked, with as many weights as the Llama); all by default.
        backends: Of composer, te, local and compile (plain PyTorch, compiled); these by default. Further: compile-bf16
            (weights, gradients and moments in bf16), and parts of others, as in composer+loss=linear.
        lengths: Tokens in a sequence; 4096, 8192, 32768, 16384 and 2048 by default.
        step_tokens: Tokens of a step; 65,536 by default, eight GPUs' share of half a million.
        quick: Llama and stacked, composer and compile, 4096 tokens.
        budget: Seconds, for which rounds are left out, but no rows.
        output: The JSON file; by default runs/bench/DEVICE/training.json.
        json: Print one JSON object for programs at the end.
    """
    from composer_megatron.bench.training import TrainingBenchmark, run_training
    from composer_megatron.env import device_name

    output = output or Path("runs/bench") / device_name() / "training.json"
    asked = TrainingBenchmark(
        shapes=shapes,
        models=models,
        backends=backends,
        lengths=lengths,
        step_tokens=step_tokens,
        quick=quick,
        budget=budget,
    )
    run_training(asked, output, aside=json)
    if json:
        print_json(read_json(output, "a training result"))
    else:
        console.print(f"written to {output}")


def bench_kernels(
    *,
    ops: tuple[str, ...] = (),
    quick: bool = False,
    tune: bool = False,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Time our kernels beside their peers on this GPU; needs a checkout of the source.

    Args:
        ops: Operations such as rms_norm and swiglu; all by default.
        quick: Few shapes.
        tune: Time launch configurations instead of peers.
        output: Folder of the JSON results; by default runs/bench/DEVICE.
        json: Print one JSON object for programs at the end.
    """
    from composer_megatron.bench import kernels as bench
    from composer_megatron.env import device_name

    chosen = bench.choose(ops, bench.scripts())
    output = output or Path("runs/bench") / device_name()
    failed = bench.run(chosen, output, [flag for flag, wanted in (("--quick", quick), ("--tune", tune)) if wanted])
    verdicts = [] if tune else bench.load(output, (op for op in chosen if op not in failed))
    if json:
        print_json([vars(verdict) for verdict in verdicts])
    elif verdicts:
        print_verdicts(verdicts)
    if failed:
        raise ComposerError(f"no result for {', '.join(failed)}: see the messages above; the others are in {output}")
