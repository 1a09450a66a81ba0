"""Prefill and decoding of Llama and Composites: ``python benchmarks/bench_inference.py --output results.json``.

Weights are random: time depends on shapes alone. A decoding step is the whole of it, from the logits of the step before
to the next ones, choice included, for every request of the batch; it is timed in a CUDA graph and launched one by one,
over a cache that holds so many tokens a request. A prefill is a batch of prompts of that length, from the host's lists
of tokens to the logits on the GPU. The models of a shape take turns in each cell, so that a change of clocks meets all.

The bytes of a step are those of the weights and of the cached keys and values, each read once; its fraction is of the
copy bandwidth that this GPU reaches in the same run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timing import copy_bandwidth

from composer_kernels.linear_decode import MOST_ROWS
from composer_megatron.architecture import Architecture
from composer_megatron.env import environment
from composer_megatron.errors import ComposerError
from composer_megatron.files import write_json
from composer_megatron.inference.cache import make_cache
from composer_megatron.inference.engine import Admission, Engine
from composer_megatron.inference.sampling import GREEDY, Sampling
from composer_megatron.inference.weights import Weights, random_weights
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape
from composer_search.extrapolate import extrapolate

BF16 = torch.bfloat16
DEVICE = torch.device("cuda")
ROOM = 64
"""Tokens for which a request's cache has room beyond its context: those that are decoded while the clock runs."""
IN_GRAPH, LAUNCHED = (32, 7), (8, 5)
"""Steps in a sample, and samples, of steps in a graph and of others; at most `ROOM` steps."""
MOST_PREFILLED = 65_536
"""Tokens of a batch of prompts; more take their time in proportion, and are not timed."""
DRAWING = Sampling(temperature=0.8, top_k=50, top_p=0.95)


@dataclass
class Row:
    """One model in one cell; times in seconds, None where there is none, and then `note` says why.

    Attributes:
        shape: Preset.
        model: Llama, or how the Composite was grown.
        sequence: Its blocks.
        batch: Requests.
        context: Tokens of each in the cache, or of each prompt.
        prefill: Time of the prompts.
        graph: Time of a decoding step in a CUDA graph, as `Decoder` does it of its own accord.
        fused: Time of one whose products are `linear_decode`.
        cublas: Time of one whose products are cuBLAS's, and the rest apart.
        eager: Time of one launched kernel by kernel.
        drawn: Time of one in a graph that draws (temperature, top-k and top-p) instead of taking the likeliest token.
        bytes: Weights and cache that a step reads.
        fraction: Of the copy bandwidth, by `bytes` and `graph`.
        cache: Bytes that allocating the cache requested.
        cache_formula: What they should be.
        advantage: Llama's `graph` over this one.
        prefill_advantage: Llama's `prefill` over this one.
        note: What there is to say.
    """

    shape: str
    model: str
    sequence: str
    batch: int
    context: int
    prefill: float | None = None
    graph: float | None = None
    fused: float | None = None
    cublas: float | None = None
    eager: float | None = None
    drawn: float | None = None
    bytes: int | None = None
    fraction: float | None = None
    cache: int | None = None
    cache_formula: int | None = None
    advantage: float | None = None
    prefill_advantage: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Model:
    """A named architecture and its weights."""

    name: str
    architecture: Architecture
    weights: Weights


def models(shape_name: str, names: Sequence[str]) -> list[Model]:
    """Llama and the grown Composites at one shape; all in memory at once."""
    shape = load_shape(shape_name)
    grown = {
        "stacked": extrapolate(CompositeSequence.parse("2A4M"), shape, method="stack"),
        "stretched": extrapolate(CompositeSequence.parse("2A5M2A3M1A3M"), shape, method="stretch"),
    }
    known = {"llama": grown["stacked"].baseline(), **grown}
    return [Model(name, known[name], random_weights(known[name], BF16, DEVICE)) for name in names]


def measure(model: Model, batch: int, context: int, *, sampled: bool, copy: float) -> Row:
    """All figures of one model in one cell."""
    row = Row(model.architecture.shape.name, model.name, model.architecture.sequence.notation, batch, context)
    capacity = context + ROOM
    row.cache_formula = batch * model.architecture.state_bytes(capacity)
    row.bytes = model.weights.bytes + batch * model.architecture.state_bytes(context)
    try:
        row.cache = bytes_of_cache(model.weights, batch, capacity)
        engine = Engine(model.weights, batch, capacity, fused=False)
        if batch * context <= MOST_PREFILLED:
            row.prefill = time_prefill(engine, context, model.architecture.shape.vocab_size)
        row.cublas = time_steps(engine, context, IN_GRAPH)
        del engine
        if batch <= MOST_ROWS:
            row.fused = time_steps(Engine(model.weights, batch, capacity, fused=True), context, IN_GRAPH)
        launched = Engine(model.weights, batch, capacity, graph=False)
        row.graph = row.fused if launched.decoder.fused else row.cublas
        row.fraction = row.bytes / row.graph / copy if row.graph else None
        row.eager = time_steps(launched, context, LAUNCHED)
        del launched
        if sampled:
            drawing = Engine(model.weights, batch, capacity, draws=True)
            drawing.admit([Admission(number, [1], DRAWING) for number in range(batch)])
            row.drawn = time_steps(drawing, context, IN_GRAPH)
    except torch.OutOfMemoryError:
        row.note = "OOM"
    except Exception as failure:  # one cell must not end the table
        reason = (str(failure).strip() or "no message").splitlines()[0]
        row.note = f"{type(failure).__name__}: {reason}"[:200]
    return row


def bytes_of_cache(weights: Weights, batch: int, capacity: int) -> int:
    """Bytes that allocating a cache takes, by the GPU's allocator."""
    before = requested_bytes()
    cache = make_cache(weights, batch, capacity)
    held = requested_bytes() - before
    del cache
    return held


def requested_bytes() -> int:
    """Bytes that tensors hold, as they were asked for, without the allocator's rounding."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def time_steps(engine: Engine, context: int, plan: tuple[int, int]) -> float:
    """Median seconds of a decoding step with so many tokens of each request in the cache.

    Args:
        engine: Decodes.
        context: Tokens of each request.
        plan: Steps in a sample, and samples.
    """
    steps, samples = plan

    def run() -> None:
        for _ in range(steps):
            engine.step()

    for layer in engine.decoder.cache:
        if layer is not None:
            layer.keys.normal_()
            layer.values.normal_()
    times = []
    for number in range(samples + 2):
        engine.assume(context)
        seconds = elapsed(run) / steps
        if number >= 2:  # the first capture, compile and warm up
            times.append(seconds)
        if number == 2 and seconds * steps > 0.5:  # long ones need no repetition
            break
    return statistics.median(times)


def time_prefill(engine: Engine, context: int, vocab_size: int, samples: int = 3) -> float:
    """Median seconds to run a prompt of so many tokens in every row."""
    tokens = torch.randint(vocab_size, (engine.rows, context), generator=torch.Generator().manual_seed(0)).tolist()
    admissions = [Admission(row, prompt, GREEDY) for row, prompt in enumerate(tokens)]
    times = []
    for _ in range(samples + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.admit(admissions)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def elapsed(run: Callable[[], None]) -> float:
    """Seconds between two events on the GPU around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def agreement(model: Model, steps: int = 24) -> str:
    """Whether graph and single launches choose the same tokens after the same prompts; what is wrong otherwise."""
    prompts = [[1, 2, 3, 4, 5], [7] * 33]
    found = []
    for graph in (True, False):
        engine = Engine(model.weights, len(prompts), 128, graph=graph)
        engine.admit([Admission(row, prompt, GREEDY) for row, prompt in enumerate(prompts)])
        for _ in range(steps):
            engine.step()
        found.append(engine.recent(steps).wait().tolist())
    return "equal" if found[0] == found[1] else f"graph {found[0]}, launched {found[1]}"


def cells(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Batch and context of each cell, small ones first."""
    return itertools.product(options.batches, options.contexts)


def show(row: Row) -> None:
    """Print one line."""

    def cell(value: float | None, scale: float, form: str) -> str:
        return "-".rjust(int(form.partition(".")[0])) if value is None else format(value * scale, form)

    parts = (
        cell(row.prefill, 1e3, "10.2f"),
        cell(row.graph, 1e3, "8.3f"),
        cell(row.fused, 1e3, "8.3f"),
        cell(row.cublas, 1e3, "8.3f"),
        cell(row.eager, 1e3, "8.3f"),
        cell(row.drawn, 1e3, "8.3f"),
        cell(row.fraction, 1, "6.3f"),
        cell(row.advantage, 1, "6.3f"),
        cell(row.prefill_advantage, 1, "8.3f"),
        cell(row.cache, 1e-6, "9.1f"),
        "=" if row.cache == row.cache_formula else "≠",
    )
    print(f"{row.shape:5} {row.model:9} {row.batch:5} {row.context:7} {' '.join(parts)} {row.note}", flush=True)


HEADING = (
    f"{'shape':5} {'model':9} {'batch':>5} {'context':>7} {'prefill ms':>10} {'graph ms':>8} {'fused':>8} "
    f"{'cublas':>8} {'eager ms':>8} {'drawn ms':>8} {'of copy':>6} {'x llama':>6} {'x prefill':>8} "
    f"{'cache MB':>9} as computed"
)


def parse() -> argparse.Namespace:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="one shape, Llama and one Composite, four cells")
    options.add_argument("--shapes", nargs="+", default=["1b", "350m", "3b"])
    options.add_argument("--models", nargs="+", default=["llama", "stacked", "stretched"])
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64])
    options.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192, 32_768])
    options.add_argument("--output", type=Path, help="write all figures there as JSON, after every cell")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.shapes, chosen.models = ["1b"], ["llama", "stacked"]
        chosen.batches, chosen.contexts = [1, 32], [512, 8192]
    return chosen


def main() -> None:
    """Run from the command line."""
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("bench_inference needs a CUDA GPU, and there is none")
    copy, rows, checks = copy_bandwidth(), list[Row](), dict[str, str]()
    facts = {"what": __doc__, "date": time.strftime("%Y-%m-%d"), "gpu": torch.cuda.get_device_name(), "copy": copy}
    facts["environment"] = environment()
    print(f"{facts['gpu']}, copy {copy / 1e12:.3f} TB/s, weights random\n{HEADING}", flush=True)
    for shape in options.shapes:
        candidates = models(shape, options.models)
        for model in candidates:
            name = f"{shape} {model.name}"
            checks[name] = agreement(model)
            print(f"{name}: graph and single launches choose: {checks[name]}", flush=True)
        for batch, context in cells(options):
            llama: Row | None = None
            for model in candidates:
                row = measure(model, batch, context, sampled=context == min(options.contexts), copy=copy)
                llama = row if model.name == "llama" else llama
                compare(row, llama)
                rows.append(row)
                show(row)
                if options.output is not None:
                    write_json(options.output, {**facts, "checks": checks, "rows": [asdict(each) for each in rows]})
                gc.collect()
                torch.cuda.empty_cache()
        del candidates, model
        gc.collect()
        torch.cuda.empty_cache()


def compare(row: Row, llama: Row | None) -> None:
    """Set a row beside Llama's."""
    if llama is None:
        return
    if row.graph and llama.graph:
        row.advantage = llama.graph / row.graph
    if row.prefill and llama.prefill:
        row.prefill_advantage = llama.prefill / row.prefill


if __name__ == "__main__":
    try:
        main()
    except ComposerError as error:
        print(f"bench_inference: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
