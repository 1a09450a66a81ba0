"""``bench inference``: prefill and decoding of Llama and Composites on this machine."""

from __future__ import annotations

from pathlib import Path

from composer_megatron.display import console, print_json
from composer_megatron.errors import UsageError
from composer_megatron.files import read_json


def bench_inference(
    *,
    shapes: tuple[str, ...] = (),
    models: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    contexts: tuple[int, ...] = (),
    quick: bool = False,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Latency of prefill and of a decoding step, Llama and Composites; needs a GPU and a checkout of the source.

    Args:
        shapes: Presets or JSON files; 1b, 350m and 3b by default.
        models: Of llama, stacked and stretched; all by default.
        batches: Requests at a time; 1, 8, 32 and 64 by default.
        contexts: Tokens of a request; 512, 2048, 8192 and 32768 by default.
        quick: One shape, two models, four cells.
        output: The JSON file; by default runs/bench/DEVICE/inference.json.
        json: Print one JSON object for programs at the end.
    """
    from composer_megatron.bench.training import ROOT, run_script
    from composer_megatron.env import device_name

    for name, values in (("batches", batches), ("contexts", contexts)):
        for value in values:
            if value < 1:
                raise UsageError(f"{name}={value}; expected at least 1")
    output = output or Path("runs/bench") / device_name() / "inference.json"
    arguments = ["--quick"] if quick else []
    for option, given in (("shapes", shapes), ("models", models), ("batches", batches), ("contexts", contexts)):
        arguments += [f"--{option}", *map(str, given)] if given else []
    run_script(ROOT / "benchmarks" / "bench_inference.py", arguments, output, aside=json)
    if json:
        print_json(read_json(output, "an inference result"))
    else:
        console.print(f"written to {output}")
