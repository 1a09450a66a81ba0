"""Prefill and decoding of Llama and Composites: ``python benchmarks/bench_inference.py --output results.json``.

Weights are random: time depends on shapes alone. A decoding step is the whole of it, from the logits of the step before
to the next ones, choice included, for every request of the batch; it is timed in a CUDA graph and launched one by one,
over a cache that holds so many tokens a request. A prefill is a batch of prompts of that length, from the host's lists
of tokens to the logits on the GPU. The models of a shape take turns in each cell, so that a change of clocks meets all.

The bytes of a step are those of the weights and of the cached keys and values, each read once; its fractions are of
the bandwidths of copying and of reading that this GPU reaches in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from inference_rows import HEADING, Row, compare, show
from step_profile import Share, shares
from timing import Ceilings, ceilings, own_stream

from composer_kernels.linear_decode import MOST_ROWS
from composer_kernels.overlap import Overlap
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
"""Tokens of a batch of prompts that are timed in their cell; more, afterwards, as far as time is left."""
MODELS = ("llama", "stacked", "stretched")
DRAWING = Sampling(temperature=0.8, top_k=50, top_p=0.95)


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


def measure(model: Model, batch: int, context: int, *, sampled: bool, limits: Ceilings) -> Row:
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
            for overlap in get_args(Overlap):
                engine = Engine(model.weights, batch, capacity, fused=True, overlap=overlap)
                row.fused[overlap] = time_steps(engine, context, IN_GRAPH)
                del engine
        launched = Engine(model.weights, batch, capacity, graph=False)
        decoder = launched.decoder
        row.graph = row.fused[decoder.overlap] if decoder.fused else row.cublas
        if row.graph:
            row.fraction, row.read_fraction = (row.bytes / row.graph / rate for rate in (limits.copy, limits.read))
        row.eager = time_steps(launched, context, LAUNCHED)
        del launched, decoder
        if sampled:
            drawing = Engine(model.weights, batch, capacity, draws=True)
            drawing.admit([Admission(number, [1], DRAWING) for number in range(batch)])
            row.drawn = time_steps(drawing, context, IN_GRAPH)
    except Exception as failure:  # one cell must not end the table
        reason = (str(failure).strip() or "no message").splitlines()[0]
        row.note = "OOM" if lacked_memory(failure) else f"{type(failure).__name__}: {reason}"[:200]
    return row


def lacked_memory(failure: BaseException | None) -> bool:
    """Whether an error is for lack of memory, or comes from a capture that ended so."""
    return failure is not None and (isinstance(failure, torch.OutOfMemoryError) or lacked_memory(failure.__context__))


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

    # Of its own: a capture that fails leaves PyTorch's generator as if it went on.
    generator = torch.Generator(DEVICE).manual_seed(0)
    for layer in engine.decoder.cache:
        if layer is not None:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
    times = []
    for number in range(samples + 2):
        engine.assume(context)
        seconds = elapsed(run) / steps
        if number >= 2:  # the first capture, compile and warm up
            times.append(seconds)
        if number >= 2 and sum(times) * steps > 0.3:  # long ones need no repetition
            break
    return statistics.median(times)


def time_prefill(engine: Engine, context: int, vocab_size: int, *, warm: bool = False) -> float:
    """Median seconds to run a prompt of so many tokens in every row; of a single run if its kernels are `warm`."""
    tokens = torch.randint(vocab_size, (engine.rows, context), generator=torch.Generator().manual_seed(0)).tolist()
    admissions = [Admission(row, prompt, GREEDY) for row, prompt in enumerate(tokens)]
    times = []
    for number in range(1 if warm else 4):
        if number == 2 and times[-1] > 0.3:  # a long one needs no repetition
            break
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.admit(admissions)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times if warm else times[1:])


def time_long_prefills(models: Sequence[Model], rows: Sequence[Row], end: float) -> Iterator[tuple[Row, bool]]:
    """Time the prompts that were too many for their cell, once each, the fewest tokens first.

    Args:
        models: Of one shape.
        rows: All; they get the figures. From fewer prompts of a length it is known how long more will take.
        end: By the monotonic clock; none begins that would take longer.

    Yields:
        Each such row, and whether it was tried.
    """
    shape, by_name = models[0].architecture.shape, {model.name: model for model in models}
    rows = [row for row in rows if row.shape == shape.name]
    waiting = [row for row in rows if row.prefill is None and not row.note]
    for row in sorted(waiting, key=lambda row: (row.batch * row.context, row.context)):
        known = [each for each in rows if (each.model, each.context) == (row.model, row.context) and each.prefill]
        expected = max((row.batch * (each.prefill or 0) / each.batch for each in known), default=float("inf"))
        fits = time.monotonic() + expected <= end
        if fits:
            try:
                engine = Engine(by_name[row.model].weights, row.batch, row.context + ROOM, fused=False)
                row.prefill = time_prefill(engine, row.context, shape.vocab_size, warm=bool(known))
                del engine
            except torch.OutOfMemoryError:
                row.note = "OOM in the prefill"
            same = [each for each in rows if (each.batch, each.context) == (row.batch, row.context)]
            compare(row, next((each for each in same if each.model == "llama"), None))
            gc.collect()
            torch.cuda.empty_cache()
        yield row, fits


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
    """Whether graph, single launches and overlapping kernels choose the same tokens; what is wrong otherwise."""
    prompts = [[1, 2, 3, 4, 5], [7] * 33]
    kinds = (tokens_chosen(model, given, steps) for given in (prompts[:1], prompts))  # one row has a kernel of its own
    different = [kind for kind in kinds if kind.count(kind[0]) < len(kind)]
    return "equal" if not different else f"launched {different[0][0]}, then {different[0][1:]}"


def tokens_chosen(model: Model, prompts: Sequence[list[int]], steps: int) -> list[list[list[int]]]:
    """What graph, single launches and overlapping kernels choose for these prompts."""
    found = []
    for graph, overlap in itertools.product((False, True), get_args(Overlap)):
        engine = Engine(model.weights, len(prompts), 128, graph=graph, fused=True, overlap=overlap)
        engine.admit([Admission(row, prompt, GREEDY) for row, prompt in enumerate(prompts)])
        for _ in range(steps):
            engine.step()
        found.append(engine.recent(steps).wait().tolist())
    return found


def compile_kernels(model: Model, wanted: Sequence[tuple[int, int]]) -> None:
    """Run a step of each cell with one block of each kind, on all cores: many cells have kernels of their own.

    What fails here will fail again in its cell.
    """
    blocks = {block.attends: block for block in model.weights.blocks}
    short = dataclasses.replace(model.weights, blocks=tuple(blocks.values()))

    def step(batch: int, context: int, fused: bool, overlap: Overlap) -> None:
        Engine(short, batch, context + ROOM, graph=False, fused=fused, overlap=overlap).step()

    torch.cuda.synchronize()  # the threads have streams of their own
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in {batch for batch, _ in wanted if batch <= MOST_ROWS}:
            for overlap in get_args(Overlap):
                pool.submit(step, batch, min(context for _, context in wanted), True, overlap)
        for batch, context in wanted:
            pool.submit(step, batch, context, False, "none")
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()


def profile(model: Model, context: int) -> list[Share]:
    """The kernels of a step of one request with so many tokens in the cache."""
    engine = Engine(model.weights, 1, context + ROOM)
    engine.assume(context)
    for _ in range(3):
        engine.step()
    return shares(engine.step)


def cells(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Batch and context of each cell, small ones first."""
    return itertools.product(options.batches, options.contexts)


def count(text: str) -> int:
    """A number of requests or tokens."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def parse() -> argparse.Namespace:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="one shape, Llama and one Composite, four cells")
    options.add_argument("--shapes", nargs="+", default=["1b", "350m", "3b"])
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--batches", nargs="+", type=count, default=[1, 8, 32, 64])
    options.add_argument("--contexts", nargs="+", type=count, default=[512, 2048, 8192, 32_768])
    options.add_argument("--output", type=Path, help="write all figures there as JSON, after every cell")
    options.add_argument("--profile", action="store_true", help="list the kernels of a step of the first cell, too")
    options.add_argument("--budget", type=float, help="seconds after which no further cell begins")
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
    with own_stream():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Measure everything; after each cell what there is is written."""
    begin, limits = time.monotonic(), ceilings()[0]
    rows, checks, profiles, left_out = list[Row](), dict[str, str](), dict[str, object](), list[str]()
    facts = {"what": __doc__, "date": time.strftime("%Y-%m-%d"), "gpu": torch.cuda.get_device_name()}
    facts |= {"copy": limits.copy, "read": limits.read, "environment": environment()}
    bandwidths = f"copy {limits.copy / 1e12:.3f} TB/s, read {limits.read / 1e12:.3f} TB/s"
    print(f"{facts['gpu']}, {bandwidths}, weights random\n{HEADING}", flush=True)

    def write() -> None:
        if options.output is not None:
            found = {"checks": checks, "profiles": profiles, "left_out": left_out}
            write_json(options.output, {**facts, **found, "rows": [asdict(each) for each in rows]})

    for shape in options.shapes:
        candidates = models(shape, options.models)
        compile_kernels(candidates[0], list(cells(options)))
        print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
        for model in candidates:
            name = f"{shape} {model.name}"
            checks[name] = agreement(model)
            print(f"{name}: graph, single launches and overlapping kernels choose: {checks[name]}", flush=True)
            if options.profile:
                profiles[name] = found = [asdict(share) for share in profile(model, min(options.contexts))]
                for share in found[:14]:
                    print(f"  {share['us']:9.1f} us {share['launches']:6.1f} x {share['name'][:90]}", flush=True)
        for batch, context in cells(options):
            if options.budget is not None and time.monotonic() - begin > options.budget:
                left_out.append(f"{shape}, batch {batch}, context {context}")
                continue
            llama: Row | None = None
            for model in candidates:
                row = measure(model, batch, context, sampled=context == min(options.contexts), limits=limits)
                llama = row if model.name == "llama" else llama
                compare(row, llama)
                rows.append(row)
                show(row)
                write()
                gc.collect()
                torch.cuda.empty_cache()
        for row, tried in time_long_prefills(candidates, rows, begin + (options.budget or float("inf"))):
            if tried:
                show(row)
                write()
            else:
                left_out.append(f"{shape} {row.model}, batch {row.batch}, context {row.context}: prefill")
        del candidates, model
        gc.collect()
        torch.cuda.empty_cache()
    write()
    if left_out:
        print(f"{len(left_out)} cells left out after {options.budget:.0f} s: {'; '.join(left_out)}", flush=True)
    print(f"{time.monotonic() - begin:.0f} s in all", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ComposerError as error:
        print(f"bench_inference: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
