"""Time the population trainer beside one candidate at a time: ``python benchmarks/bench_search.py --output out.json``.

Four parts, each printed as a table and written as JSON:

- speed: candidate-steps a second of the population and of `composer_search.trainer.train`, one candidate after the
  other in eager PyTorch, at the same precision;
- memory: what a row takes and what the plan expected;
- work: the FLOPs of the six-block oracle and of the 16-block study, counted;
- hours: what both would take, from the steps and evaluations of each of MAD's six baseline tasks, timed here.

Data are random tokens: times do not depend on what is learnt. On a GPU the clock is the wall's and the device is waited
for; on a CPU it is the process's own time on one thread, so that neighbours on the machine do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from composer_megatron.env import environment
from composer_megatron.files import write_json
from composer_megatron.sequence import CompositeSequence
from composer_search.candidate import Widths
from composer_search.mad import Setting, baseline
from composer_search.mad.tasks import find_task
from composer_search.population import Row
from composer_search.population.plan import flops_per_token, row_bytes, rows_at_once
from composer_search.population.population import Population
from composer_search.population.replay import WARM_UP, cuda_graph
from composer_search.trainer import TaskData, TrainSettings, choose_device, matmul_precision, train

EPOCHS, SEEDS, TRIALS, BATCH_OF_TRIALS = 50, 3, 300, 16
"""The oracle's epochs and seeds; the 16-block study's trials, and how many of them are proposed and trained at once."""

EVALUATE_EVERY = 500
"""Steps between evaluations in the predicted studies."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What one row of the population trains.

    Attributes:
        name: In the tables.
        vocab_size: Of the tokens.
        length: Of the sequences.
        batch_size: Sequences a step.
        widths: Of the model.
        blocks: Length of the sequence of blocks.
        rows: Rows of the population, if they fit.
        autoencoder: Whether the head is the auto-encoder's.
    """

    name: str
    vocab_size: int
    length: int
    batch_size: int
    widths: Widths
    blocks: int
    rows: int
    autoencoder: bool = False

    def settings(self, precision: str, device: torch.device, steps: int) -> TrainSettings:
        """Settings under which nothing ends early."""
        return TrainSettings(
            widths=self.widths,
            steps=steps,
            batch_size=self.batch_size,
            evaluate_every=steps,
            patience=0,
            solved=2.0,
            precision=precision,  # type: ignore[arg-type]
            device=str(device),
        )

    def data(self, judged: int) -> TaskData:
        """Random tokens: `judged` sequences to validate on."""
        rng = np.random.default_rng(0)
        sizes = (max(256, 2 * self.batch_size), judged, 16)
        splits = [tuple(rng.integers(self.vocab_size, size=(2, size, self.length))) for size in sizes]
        return TaskData(self.vocab_size, *splits, autoencoder=self.autoencoder)

    def sequences(self, number: int) -> list[CompositeSequence]:
        """`number` sequences of that many blocks, of which half are attention on average."""
        if number == 1:
            return [CompositeSequence(("AM" * self.blocks)[: self.blocks])]
        if number >= 2**self.blocks:
            every = ["".join(letters) for letters in itertools.product("AM", repeat=self.blocks)]
            return [CompositeSequence(every[place % len(every)]) for place in range(number)]
        rng = np.random.default_rng(1)
        half = ["".join(rng.choice(list("AM"), self.blocks)) for _ in range(-(-number // 2))]
        swapped = [letters.translate(str.maketrans("AM", "MA")) for letters in half]
        return [CompositeSequence(letters) for pair in zip(half, swapped, strict=True) for letters in pair][:number]

    def population(self, precision: str, device: torch.device, judged: int) -> list[Row]:
        """The rows, as many as are worth training at once on the device and fit."""
        settings, data = self.settings(precision, device, steps=1), self.data(judged)
        rows = [Row(sequence, data, 1e-3) for sequence in self.sequences(self.rows)]
        at_once = rows_at_once(rows, settings, device)
        return rows[:at_once] if at_once > 1 else [Row(self.sequences(1)[0], data, 1e-3)]


def clock(device: torch.device) -> Callable[[], float]:
    """Reads the time after all work on the device is done."""
    if device.type != "cuda":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured of one contender in one case; seconds are medians.

    Attributes:
        case: The case.
        contender: Who.
        precision: What matrices were multiplied in.
        rows: Candidates at once.
        step: Seconds of a step of all of them.
        spread: Its largest minus its smallest value in three rounds, as a share of it.
        look: Seconds of judging all of them on the validation data.
        peak: Bytes allocated at most, on a GPU.
        planned: Bytes that the plan expected.
        note: Why there is no figure.
    """

    case: str
    contender: str
    precision: str
    rows: int = 1
    step: float = float("nan")
    spread: float = float("nan")
    look: float = float("nan")
    peak: int | None = None
    planned: int | None = None
    note: str = ""

    @property
    def candidate_step(self) -> float:
        """Seconds of a step of one candidate."""
        return self.step / self.rows


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to train: the population's options, or none of it."""

    name: str
    population: bool = True
    graph: bool = False
    fuse: bool = False


ALONE = Contender("one at a time, eager", population=False)
EAGER = Contender("population, eager")
GRAPH = Contender("population, CUDA graph", graph=True)
FUSED = Contender("population, CUDA graph, compiled", graph=True, fuse=True)


def measure(case: Case, contender: Contender, precision: str, device: torch.device, judged: int = 64) -> Speed:
    """Time one contender; what it raises becomes the figure's note."""
    blank = Speed(case.name, contender.name, precision)
    try:
        with matmul_precision(precision):  # type: ignore[arg-type]
            if contender.population:
                return _population(case, contender, blank, device, judged)
            return _alone(case, blank, device)
    except RuntimeError as error:  # a contender that fails must not end the others
        return dataclasses.replace(blank, note=f"{type(error).__name__}: {str(error).splitlines()[0]}"[:160])
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _alone(case: Case, blank: Speed, device: torch.device) -> Speed:
    """The marginal cost of a step: long trainings minus short ones, so that their ends do not count."""
    now, data, sequences = clock(device), case.data(16), case.sequences(4)

    def seconds(steps: int) -> float:
        settings = dataclasses.replace(case.settings(blank.precision, device, steps), learning_rates=(1e-3,))
        start = now()
        for sequence in sequences:
            train(sequence, data, settings, seed=0)
        return now() - start

    seconds(3)
    steps = int(min(60, max(2, 1.0 / (seconds(2) / 2))))
    rounds = [(seconds(3 * steps) - seconds(steps)) / (2 * steps * len(sequences)) for _ in range(3)]
    return _with_rounds(blank, rounds)


def _population(case: Case, contender: Contender, blank: Speed, device: torch.device, judged: int) -> Speed:
    now = clock(device)
    rows, settings = case.population(blank.precision, device, judged), case.settings(blank.precision, device, 10**6)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    population = Population(rows, settings, device, cuda_graph if contender.graph else None, contender.fuse)
    population.advance(WARM_UP + 2 if contender.graph else 2)
    population.look()
    start = now()
    population.advance(population.step + 2)
    steps = int(min(200, max(2, 0.7 / ((now() - start) / 2))))

    def seconds(run: Callable[[], object]) -> float:
        start = now()
        run()
        return now() - start

    rounds = [seconds(lambda: population.advance(population.step + steps)) / steps for _ in range(3)]
    return dataclasses.replace(
        _with_rounds(blank, rounds),
        rows=len(rows),
        look=statistics.median(seconds(population.look) for _ in range(3)),
        peak=torch.cuda.max_memory_allocated() if on_gpu else None,
        planned=sum(row_bytes(row, settings, recorded=contender.graph) for row in rows),
    )


def _with_rounds(blank: Speed, rounds: Sequence[float]) -> Speed:
    middle = statistics.median(rounds)
    return dataclasses.replace(blank, step=middle, spread=(max(rounds) - min(rounds)) / middle)


def speed_cases(device: torch.device, quick: bool) -> list[Case]:
    """MAD's widths and batch at two lengths on a GPU; models and batches that a search on a CPU would use there."""
    if device.type == "cuda":
        lengths = [("S=32", 256, 32), ("S=128", 16, 128)]
        return [Case(name, vocab, length, 128, Widths(), blocks=6, rows=192) for name, vocab, length in lengths]
    small = Widths(hidden_size=32, num_heads=4, ffn_hidden_size=96)
    batches = (4,) if quick else (4, 8, 16)
    return [Case(f"{32 * batch} tokens", 16, 32, batch, small, blocks=6, rows=64) for batch in batches]


def task_case(setting: Setting, blocks: int, rows: int) -> Case:
    """One of MAD's baseline tasks."""
    sampler = find_task(setting.task).at(**setting.settings)
    autoencoder = setting.task == "compression"
    return Case(setting.task, sampler.vocab_size, sampler.length, 128, Widths(), blocks, rows, autoencoder)


@dataclasses.dataclass(frozen=True)
class Study:
    """Trainings to come: candidates of `blocks` blocks, trained `together` at a time on MAD's six baseline tasks."""

    name: str
    blocks: int
    candidates: int
    seeds: int
    together: int

    @property
    def trainings(self) -> int:
        """Trainings of each task."""
        return self.candidates * self.seeds


ORACLE = Study("64 six-block sequences, 3 seeds, 50 epochs", 6, 64, SEEDS, 64 * SEEDS)
STUDY = Study("300 trials of 16 blocks, 1 seed, 50 epochs", 16, TRIALS, 1, BATCH_OF_TRIALS)


def training_steps(setting: Setting) -> int:
    """Optimizer steps of one training of the studies."""
    return EPOCHS * max(1, setting.n_train // 128)


def work(study: Study) -> dict[str, float]:
    """FLOPs of a study: products with weights, and attention's own."""
    totals = {"weights": 0.0, "attention": 0.0}
    for setting in baseline():
        case = task_case(setting, study.blocks, study.together)
        sequence = CompositeSequence("AM" * (study.blocks // 2))  # the average of all sequences
        parts = flops_per_token(sequence, case.widths, case.vocab_size, case.length)
        tokens = training_steps(setting) * 128 * case.length * study.trainings
        for name, flops in zip(totals, parts, strict=True):
            totals[name] += tokens * flops
    return totals


def predict(study: Study, contender: Contender, precision: str, device: torch.device) -> dict[str, Any]:
    """Hours of a study: for each task, steps and evaluations as timed here, times how often they occur."""
    tasks: dict[str, dict[str, Any]] = {}
    for setting in baseline():
        speed = measure(task_case(setting, study.blocks, study.together), contender, precision, device, setting.n_test)
        steps = training_steps(setting)
        turns = study.trainings / speed.rows
        seconds = turns * (steps * speed.step + -(-steps // EVALUATE_EVERY) * speed.look)
        tasks[setting.task] = {"steps": steps, "hours": seconds / 3600, **dataclasses.asdict(speed)}
    hours = sum(task["hours"] for task in tasks.values())
    flops = sum(work(study).values())
    return {"study": study.name, "hours": hours, "flops_per_second": flops / hours / 3600, "tasks": tasks}


def show_speeds(speeds: Sequence[Speed]) -> None:
    """Print candidate-steps a second, and how often those of one at a time."""
    print(
        f"{'case':12} {'precision':9} {'contender':34} {'rows':>5} {'ms/cand-step':>12} {'/s':>9} {'x':>6} {'GiB':>14}"
    )
    for speed in speeds:
        if speed.note:
            print(f"{speed.case:12} {speed.precision:9} {speed.contender:34} {speed.note}")
            continue
        base = next((each for each in speeds if _is_base(each, speed)), None)
        gain = base.candidate_step / speed.candidate_step if base else float("nan")
        sizes = "/".join("-" if size is None else f"{size / 2**30:.2f}" for size in (speed.peak, speed.planned))
        each = speed.candidate_step
        print(
            f"{speed.case:12} {speed.precision:9} {speed.contender:34} {speed.rows:5} {each * 1e3:12.3f} "
            f"{1 / each:9.1f} {gain:6.2f} {sizes:>14}"
        )


def _is_base(each: Speed, speed: Speed) -> bool:
    return (each.case, each.precision, each.contender) == (speed.case, speed.precision, ALONE.name)


def plans(device: torch.device, quick: bool) -> Iterator[tuple[Contender, str]]:
    """Who competes, and in which precision."""
    if device.type != "cuda":
        yield from ((ALONE, "float32"), (EAGER, "float32"))
        return
    for precision in ("bfloat16",) if quick else ("bfloat16", "tf32", "float32"):
        contenders = (ALONE, GRAPH) if quick else (ALONE, EAGER, GRAPH, FUSED)
        yield from ((contender, precision) for contender in contenders)


def fastest(speeds: Sequence[Speed]) -> tuple[Contender, str]:
    """The contender and precision that did best in the last case."""
    ran = [each for each in speeds if each.case == speeds[-1].case and not each.note and each.contender != ALONE.name]
    best = min(ran, key=lambda each: each.candidate_step)
    return next(each for each in (EAGER, GRAPH, FUSED) if each.name == best.contender), best.precision


def main() -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description="Time the population trainer beside one candidate at a time.")
    options.add_argument("--quick", action="store_true", help="few cases, and on a CPU no prediction")
    options.add_argument("--device", default="auto", help="cpu, cuda, or auto for a GPU where there is one")
    options.add_argument("--output", type=Path, help="write all figures there as JSON")
    chosen = options.parse_args()
    device = choose_device(chosen.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    cases = speed_cases(device, chosen.quick)
    speeds = [measure(case, *who, device) for case in cases for who in plans(device, chosen.quick)]
    show_speeds(speeds)
    studies = (ORACLE, STUDY)
    flops = {study.name: work(study) for study in studies}
    for name, parts in flops.items():
        print(f"{name}: {parts['weights']:.2e} FLOPs with weights + {parts['attention']:.2e} of attention")
    predictions: list[dict[str, Any]] = []
    if device.type == "cuda" or not chosen.quick:
        who = fastest(speeds)
        for study in studies if device.type == "cuda" else (ORACLE,):
            predictions.append({"contender": who[0].name, "precision": who[1]} | predict(study, *who, device))
            found = predictions[-1]
            rate = found["flops_per_second"] / 1e12
            print(f"{study.name}: {found['hours']:.2f} h ({who[0].name}, {who[1]}, {rate:.3g} TFLOP/s)")
    if chosen.output is not None:
        measured = {"speeds": [dataclasses.asdict(speed) for speed in speeds], "flops": flops, "studies": predictions}
        figures = {"date": time.strftime("%Y-%m-%d"), **measured, "environment": environment()}
        write_json(chosen.output, _without_nan(figures))


def _without_nan(value: Any) -> Any:
    """The value with null for what was not measured, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
