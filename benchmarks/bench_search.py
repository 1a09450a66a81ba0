"""Time the population trainer beside one candidate at a time: ``python benchmarks/bench_search.py --output out.json``.

Three parts, any of which `--only` chooses; each line is printed and all figures so far are written as JSON as soon as
they are there, so that a time limit loses nothing:

- speed: candidate-steps a second of the population and of `composer_search.trainer.train`, one candidate after the
  other in eager PyTorch, at the same precision; and what memory the rows take and the plan expected;
- oracle: the FLOPs of all six-block sequences, counted, and the hours that they would take, from the steps and
  evaluations of each of MAD's six baseline tasks, timed here;
- study: the same of 300 trials of the 16-block space.

Data are random tokens, scored where the task scores its own: times do not depend on what is learnt. On a GPU the clock
is the wall's and the device is waited for; on a CPU it is the process's own time on one thread, so that neighbours on
the machine do not count.
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
from composer_search.mad import IGNORE, Setting, baseline
from composer_search.mad.tasks import find_task
from composer_search.population import Row
from composer_search.population.memory import row_bytes
from composer_search.population.plan import flops_per_token, rows_at_once
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
        unscored: First positions of a sequence that have no target.
    """

    name: str
    vocab_size: int
    length: int
    batch_size: int
    widths: Widths
    blocks: int
    rows: int
    autoencoder: bool = False
    unscored: int = 0

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
        splits = [rng.integers(self.vocab_size, size=(2, size, self.length)) for size in sizes]
        for _, targets in splits:
            targets[:, : self.unscored] = IGNORE
        train, validation, test = ((inputs, targets) for inputs, targets in splits)
        return TaskData(self.vocab_size, train, validation, test, self.autoencoder)

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

    def population(self, precision: str, device: torch.device, judged: int, fuse: bool) -> list[Row]:
        """The rows, as many as are worth training at once on the device and fit."""
        settings, data = self.settings(precision, device, steps=1), self.data(judged)
        rows = [Row(sequence, data, 1e-3) for sequence in self.sequences(self.rows)]
        at_once = rows_at_once(rows, settings, device, fuse)
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
        held: Bytes that the allocator kept for itself at most, those of recorded steps included.
        planned: Bytes that the plan expected it to keep.
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
    held: int | None = None
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
FUSED = Contender("population, CUDA graph, fused", graph=True, fuse=True)


def measure(case: Case, contender: Contender, precision: str, device: torch.device, judged: int = 64) -> Speed:
    """Time one contender; what it raises becomes the figure's note."""
    blank = Speed(case.name, contender.name, precision)
    try:
        with matmul_precision(precision):  # type: ignore[arg-type]
            if contender.population:
                return _population(case, contender, blank, device, judged)
            return _alone(case, blank, device)
    except Exception as error:  # a contender that fails, be it in a compiler, must not end the others
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
    steps = int(min(30, max(2, 1.0 / (seconds(2) / 2))))
    rounds = [(seconds(3 * steps) - seconds(steps)) / (2 * steps * len(sequences)) for _ in range(3)]
    return _with_rounds(blank, rounds)


def _population(case: Case, contender: Contender, blank: Speed, device: torch.device, judged: int) -> Speed:
    now = clock(device)
    rows = case.population(blank.precision, device, judged, contender.fuse)
    settings = case.settings(blank.precision, device, 10**6)
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
        held=torch.cuda.max_memory_reserved() if on_gpu else None,
        planned=sum(row_bytes(row, settings, recorded=contender.graph, fused=contender.fuse) for row in rows),
    )


def _with_rounds(blank: Speed, rounds: Sequence[float]) -> Speed:
    middle = statistics.median(rounds)
    return dataclasses.replace(blank, step=middle, spread=(max(rounds) - min(rounds)) / middle)


def speed_runs(device: torch.device, quick: bool, rows: Sequence[int]) -> Iterator[tuple[Case, Contender, str]]:
    """Cases, who competes in them and in which precision, what matters most first.

    On a GPU MAD's widths and batch at two lengths, with `rows` rows at once; on a CPU models and batches that a search
    would use there.
    """
    if device.type != "cuda":
        small = Widths(hidden_size=32, num_heads=4, ffn_hidden_size=96)
        cases = [Case(f"{32 * batch} tokens", 16, 32, batch, small, 6, 64) for batch in ((4,) if quick else (4, 8, 16))]
        yield from ((case, who, "float32") for case in cases for who in (ALONE, EAGER))
        return
    cases = [Case(f"S={length}", vocab, length, 128, Widths(), 6, rows[0]) for vocab, length in ((256, 32), (16, 128))]
    for precision in ("bfloat16",) if quick else ("bfloat16", "tf32", "float32"):
        yield from ((case, who, precision) for case in cases for who in (ALONE, FUSED))
        fewer = [dataclasses.replace(case, rows=number) for case in cases for number in rows[1:]]
        yield from ((case, FUSED, precision) for case in fewer)
        yield from ((case, who, precision) for case in cases for who in ((GRAPH,) if quick else (GRAPH, EAGER)))


def task_case(setting: Setting, blocks: int, rows: int) -> Case:
    """One of MAD's baseline tasks."""
    sampler = find_task(setting.task).at(**setting.settings)
    autoencoder = setting.task == "compression"
    drawn = (sampler.draw(*map(np.random.default_rng, range(2)), 64, train=train) for train in (True, False))
    unscored = min(int((targets != IGNORE).any(0).argmax()) for _, targets in drawn)
    return Case(setting.task, sampler.vocab_size, sampler.length, 128, Widths(), blocks, rows, autoencoder, unscored)


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


STUDIES = {
    "oracle": Study("64 six-block sequences, 3 seeds, 50 epochs", 6, 64, SEEDS, 64 * SEEDS),
    "study": Study("300 trials of 16 blocks, 1 seed, 50 epochs", 16, TRIALS, 1, BATCH_OF_TRIALS),
}


def training_steps(setting: Setting) -> int:
    """Optimizer steps of one training of the studies."""
    return EPOCHS * max(1, setting.n_train // 128)


def work(study: Study) -> dict[str, float]:
    """FLOPs of a study: products with weights, and attention's own; at all positions, be they asked for or not."""
    totals = {"weights": 0.0, "attention": 0.0}
    for setting in baseline():
        case = task_case(setting, study.blocks, study.together)
        sequence = CompositeSequence("AM" * (study.blocks // 2))  # the average of all sequences
        parts = flops_per_token(sequence, case.widths, case.vocab_size, case.length)
        tokens = training_steps(setting) * 128 * case.length * study.trainings
        for name, flops in zip(totals, parts, strict=True):
            totals[name] += tokens * flops
    return totals


def predict(study: Study, contender: Contender, precision: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """What each task adds to a study: its steps and evaluations as timed here, times how often they occur."""
    for setting in baseline():
        speed = measure(task_case(setting, study.blocks, study.together), contender, precision, device, setting.n_test)
        steps = training_steps(setting)
        turns = study.trainings / speed.rows
        seconds = turns * (steps * speed.step + -(-steps // EVALUATE_EVERY) * speed.look)
        yield {"steps": steps, "hours": seconds / 3600, **dataclasses.asdict(speed)}


HEAD = f"{'case':20} {'precision':9} {'contender':30} {'rows':>5} {'ms/cand-step':>12} {'/s':>9} {'x':>6} {'GiB':>18}"


def line(speed: Speed, base: Speed | None) -> str:
    """Candidate-steps a second, how often those of `base`, and the memory allocated, held and planned."""
    who = f"{speed.case:20} {speed.precision:9} {speed.contender:30}"
    if speed.note:
        return f"{who} {speed.note}"
    gain = base.candidate_step / speed.candidate_step if base else float("nan")
    sizes = "/".join("-" if size is None else f"{size / 2**30:.2f}" for size in (speed.peak, speed.held, speed.planned))
    each = speed.candidate_step
    return f"{who} {speed.rows:5} {each * 1e3:12.3f} {1 / each:9.1f} {gain:6.2f} {sizes:>18}"


class Record:
    """All figures so far: printed and written as they come.

    Args:
        output: A JSON file, or none.
    """

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self.speeds: list[Speed] = []
        self.figures: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "environment": environment()}
        print(HEAD, flush=True)

    def add(self, speed: Speed) -> None:
        """Take note of one contender's speed."""
        key = speed.case, speed.precision, ALONE.name
        base = next((each for each in self.speeds if (each.case, each.precision, each.contender) == key), None)
        self.speeds.append(speed)
        print(line(speed, base), flush=True)
        self.write(speeds=[dataclasses.asdict(each) for each in self.speeds])

    def write(self, **figures: Any) -> None:
        """Add figures and write all there are."""
        self.figures |= figures
        if self._output is not None:
            write_json(self._output, _without_nan(self.figures))

    def fastest(self, default: tuple[Contender, str]) -> tuple[Contender, str]:
        """The contender and precision that did best in the longest case, or `default` where none ran."""
        ran = [each for each in self.speeds if not each.note and each.contender != ALONE.name]
        ran = [each for each in ran if each.case == ran[-1].case]
        if not ran:
            return default
        best = min(ran, key=lambda each: each.candidate_step)
        return next(each for each in (EAGER, GRAPH, FUSED) if each.name == best.contender), best.precision


def run_study(name: str, who: tuple[Contender, str], device: torch.device, record: Record) -> None:
    """Count a study's FLOPs, and time its tasks one by one."""
    study, flops = STUDIES[name], work(STUDIES[name])
    print(
        f"{study.name}: {flops['weights']:.2e} FLOPs with weights + {flops['attention']:.2e} of attention", flush=True
    )
    tasks: list[dict[str, Any]] = []
    for task in predict(study, *who, device):
        tasks.append(task)
        label = task["note"] or f"{task['step'] / task['rows'] * 1e3:.3f} ms a candidate-step"
        print(f"  {task['case']:24} {task['hours']:8.3f} h {task['rows']:5} rows, {label}", flush=True)
        record.write(**{name: {"study": study.name, "contender": who[0].name, "flops": flops, "tasks": tasks}})
    hours = sum(task["hours"] for task in tasks)
    rate = sum(flops.values()) / hours / 3600
    record.write(**{name: record.figures[name] | {"hours": hours, "flops_per_second": rate}})
    print(f"{study.name}: {hours:.2f} h ({who[0].name}, {who[1]}, {rate / 1e12:.3g} TFLOP/s)", flush=True)


def main() -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description="Time the population trainer beside one candidate at a time.")
    options.add_argument("--quick", action="store_true", help="few cases, and on a CPU no prediction")
    options.add_argument("--only", nargs="+", choices=("speed", *STUDIES), help="parts to run; all without it")
    options.add_argument(
        "--rows", nargs="+", type=int, default=[192, 24, 6], help="rows at once on a GPU, the first first"
    )
    options.add_argument("--device", default="auto", help="cpu, cuda, or auto for a GPU where there is one")
    options.add_argument("--output", type=Path, help="write all figures there as JSON")
    chosen = options.parse_args()
    device = choose_device(chosen.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    record = Record(chosen.output)
    short = ("speed",) if chosen.quick else ("speed", "oracle")
    parts = chosen.only or (("speed", *STUDIES) if device.type == "cuda" else short)
    if "speed" in parts:
        for run in speed_runs(device, chosen.quick, chosen.rows):
            record.add(measure(*run, device))
    who = record.fastest((FUSED, "bfloat16") if device.type == "cuda" else (EAGER, "float32"))
    for name in STUDIES:
        if name in parts:
            run_study(name, who, device, record)


def _without_nan(value: Any) -> Any:
    """The value with null for what was not measured, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
