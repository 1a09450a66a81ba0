"""Training throughput: Llama and Composites, on our backend, on TransformerEngine, on Megatron-core, in plain PyTorch.

    python benchmarks/bench_training.py --quick --output results.json

A contender is a model on a backend, in a process of its own (`training_worker`). For each workload all contenders take
turns in rounds, so that a change of clocks meets all of them, and the median of all steps counts. One that runs out of
memory tries smaller micro-batches; one that fails gets a row that says why. Rows are printed and written to the file as
they come; those still to come say "not reached". A budget of seconds costs rounds, but no row and no breakdown.

A step is what a data-parallel rank of Megatron-core does: micro-batches with fp32 gradient accumulation, clipping,
AdamW on fp32 masters of bf16 weights. A rank's share of half a million tokens over eight GPUs is 65,536 tokens, the
default. TFLOP/s and MFU count causal attention (`Architecture.flops_per_token`), 989 TFLOP/s being the H100's peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training_contender import Contender, measure_ceilings
from training_models import MODELS, STACKED, STRETCHED, Workload
from training_plan import Budget, Heat, heats
from training_roofline import ideal_seconds

from composer_megatron.architecture import Architecture
from composer_megatron.env import environment
from composer_megatron.errors import ComposerError
from composer_megatron.files import write_json

PEAK = 989e12
"""Dense bf16 FLOP/s of an H100 or H200, from the data sheet."""

BACKENDS = ("composer", "te", "local", "compile")
OUT_OF_MEMORY = "out of memory"
NOT_REACHED = "not reached"
_WIDTH = 24


@dataclass
class Case:
    """Contenders on one workload, and what was measured."""

    workload: Workload
    contenders: list[Contender]
    ceilings: dict[str, Any]

    def __post_init__(self) -> None:
        """Nothing has been measured."""
        self.answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in self.contenders}
        self.profiles: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, str] = {}
        self.prepared: dict[str, dict[str, Any]] = {}
        self.sizes = {each.name: self.workload for each in self.contenders}

    def prepare(self) -> None:
        """Let all contenders compile and run a first step, side by side."""
        for each in self.contenders:
            self._ask_to_prepare(each)
        for each in self.contenders:
            answer = each.receive()
            while answer.get("note") == OUT_OF_MEMORY and self._make_smaller(each):
                answer = each.receive()
            if "note" in answer:
                self._fail(each, answer["note"])
            else:
                self.prepared[each.name] = answer
                print(f"  {each.name} ready after {answer['prepared_in']:.0f} s: {answer['says']}", flush=True)
                if "unfair" in answer:
                    print(f"  {each.name}: {answer['unfair']}", flush=True)

    def _ask_to_prepare(self, contender: Contender) -> None:
        contender.send(do="prepare", **dataclasses.asdict(self.sizes[contender.name]))

    def _make_smaller(self, contender: Contender) -> bool:
        """Ask to prepare half the micro-batch, and forget what was measured with the whole; False where it is one."""
        size = self.sizes[contender.name]
        if size.micro_batch == 1:
            return False
        self.sizes[contender.name] = size = size.halved()
        self.answers[contender.name].clear()
        self.profiles.pop(contender.name, None)
        print(f"  {contender.name}: {OUT_OF_MEMORY}; again with {size.micro_batch} x {size.seq_len}", flush=True)
        self._ask_to_prepare(contender)
        return True

    def _fail(self, contender: Contender, note: str) -> None:
        self.notes[contender.name] = note
        print(f"  {contender.name}: {note}", flush=True)

    def running(self) -> list[Contender]:
        """Those that have not failed."""
        return [each for each in self.contenders if each.name not in self.notes]

    def round(self, warmup: int, steps: int, *, profile: bool = False) -> Iterator[Contender]:
        """Let each contender run some steps, and perhaps say where the time of one more goes; yields it when it has."""
        command = {"do": "measure", "warmup": warmup, "steps": steps, "profile": profile}
        for each in self.running():
            each.send(**command)
            answer = each.receive()
            while answer.get("note") == OUT_OF_MEMORY and self._make_smaller(each):
                answer = each.receive()
                if "note" not in answer:
                    each.send(**command)
                    answer = each.receive()
            if "note" in answer:
                self._fail(each, answer["note"])
            else:
                self._keep_profile(each, answer.pop("profile", {}))
                self.answers[each.name].append(answer)
            yield each

    def _keep_profile(self, contender: Contender, profile: dict[str, Any]) -> None:
        if "note" in profile:
            print(f"  no breakdown of {contender.name}: {profile['note']}", flush=True)
        elif profile:
            self.profiles[contender.name] = profile

    def row(self, contender: Contender) -> dict[str, Any]:
        """Everything known about a contender, as JSON values."""
        architecture = contender.architecture
        row = empty_row(contender.model, architecture, contender.backend, self.sizes[contender.name])
        prepared = self.prepared.get(contender.name, {})
        answers = self.answers[contender.name]
        last = answers[-1] if answers else prepared
        row["note"] = self.notes.get(contender.name) or last.get("unfair", "")
        row["says"] = prepared.get("says", "")
        row["prepared_in"] = prepared.get("prepared_in")
        row |= {name: last[name] for name in ("attention", "unfair") if name in last}
        if answers:
            size = self.sizes[contender.name]
            row |= self._figures(architecture, size, answers)
            row |= self._parts(architecture, size, self.profiles.get(contender.name, {}))
        return row

    def _figures(self, architecture: Architecture, size: Workload, answers: list[dict[str, Any]]) -> dict[str, Any]:
        seconds = [second for answer in answers for second in answer["seconds"]]
        median = statistics.median(seconds)
        rate = size.tokens / median
        flops = architecture.flops_per_token(size.seq_len) * rate
        gemm = self.ceilings["gemm"]
        return {
            "seconds": seconds,
            "rounds": len(answers),
            "median_seconds": median,
            "spread": (max(seconds) - min(seconds)) / median,
            "tokens_per_second": rate,
            "tflops": flops / 1e12,
            "mfu": flops / PEAK if gemm else None,
            "of_gemm_rate": flops / gemm if gemm else None,
            "peak_bytes": answers[-1]["peak_bytes"],
            "loss": answers[-1]["loss"],
        }

    def _parts(self, architecture: Architecture, size: Workload, profile: dict[str, Any]) -> dict[str, Any]:
        if not self.ceilings["gemm"]:
            return profile
        return {"ideal": ideal_seconds(architecture, size.seq_len, size.tokens, self.ceilings)} | profile


def empty_row(model: str, architecture: Architecture, backend: str, size: Workload) -> dict[str, Any]:
    """What is known of a contender before anything was measured."""
    return {
        "shape": architecture.shape.name,
        "model": model,
        "sequence": architecture.sequence.notation,
        "backend": backend,
        **dataclasses.asdict(size),
        "params_total": architecture.params_total,
        "flops_per_token": architecture.flops_per_token(size.seq_len),
        "kv_bytes_per_token": architecture.kv_bytes_per_token(),
        "note": NOT_REACHED,
    }


class Report:
    """Rows, on the screen and in the file as they come."""

    def __init__(self, output: Path | None, ceilings: dict[str, Any], options: dict[str, Any]) -> None:
        """Begin with none."""
        self._output = output
        self.ceilings = ceilings
        self._rows: list[dict[str, Any]] = []
        self._result: dict[str, Any] = {
            "what": "training step: forward, loss, backward, gradient accumulation in fp32, clipping, AdamW",
            "date": time.strftime("%Y-%m-%d"),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "peak": PEAK,
            "ceilings": ceilings,
            "options": options,
            "environment": environment(),
            "rows": self._rows,
        }

    def announce(self, planned: Sequence[Heat], options: argparse.Namespace) -> None:
        """Print the ceilings, and write down what is to come: a run cut short shows what it lacks."""
        _print_ceilings(self.ceilings)
        for heat in planned:
            for model, backend in heat.pairs:
                self.put(empty_row(model, heat.models[model], backend, heat.workload(options)))

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, or replace the one of the same contender and workload."""
        key = ("shape", "model", "backend", "seq_len")
        self._rows[:] = [each for each in self._rows if any(each[name] != row[name] for name in key)] + [row]
        if self._output is not None:
            write_json(self._output, self._result)

    def show(self, heat: Heat) -> None:
        """Print what is known at a length, with ratios to the same backend's Llama and to torch.compile's."""
        shapes = {architecture.shape.name for architecture in heat.models.values()}
        rows = [row for row in self._rows if row["seq_len"] == heat.seq_len and row["shape"] in shapes]
        rows = [row for row in rows if row["note"] != NOT_REACHED]
        fair = [row for row in rows if not row.get("unfair")]
        rates = {(row["model"], row["backend"]): row.get("tokens_per_second") for row in fair}
        heading = f"{'model':10}{'backend':{_WIDTH}}{'tokens/s':>10}{'spread':>8}{'TFLOP/s':>9}{'MFU':>7}{'of GEMM':>8}"
        print(f"{heading}{'GB':>7}{'/llama':>8}{'/compile':>9}  parts in ms", flush=True)
        for row in rows:
            print(_line(row, rates), flush=True)


def _line(row: dict[str, Any], rates: dict[tuple[str, str], float | None]) -> str:
    start = f"{row['model']:10}{row['backend']:{_WIDTH}}"
    rate = row.get("tokens_per_second")
    if rate is None:
        return f"{start} {row['note'] or 'prepared, not yet measured'}"
    against = (rates.get(("llama", row["backend"])), rates.get((row["model"], "compile")))
    fair = not row.get("unfair")
    ratios = "".join(f"{rate / other:>8.3f} " if other and fair else f"{'-':>8} " for other in against)
    mfu = "".join("-".rjust(8) if value is None else f"{value:>8.1%}" for value in (row["mfu"], row["of_gemm_rate"]))
    memory_used = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
    parts = "  ".join(f"{name} {1e3 * took:.1f}" for name, took in sorted(row.get("breakdown", {}).items()))
    figures = f"{rate:>10,.0f}{row['spread']:>8.1%}{row['tflops']:>9.1f}{mfu[1:]}{memory_used:>7}"
    return f"{start}{figures}{ratios} {parts} {row['note']}"


def run(options: argparse.Namespace) -> None:
    """Measure everything asked for."""
    planned = heats(options)
    budget = Budget(options.budget, len(planned))
    with tempfile.TemporaryDirectory(prefix="bench-training-") as name:
        folder = Path(name)
        logs = options.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        contenders: list[Contender] = []
        try:
            report: Report | None = None
            for before, heat in zip([None, *planned], planned, strict=False):
                if before is None or before.pairs != heat.pairs or before.models != heat.models:
                    _end(contenders)
                    contenders[:] = [
                        Contender(model, heat.models[model], backend, folder, logs) for model, backend in heat.pairs
                    ]
                if report is None:
                    report = Report(options.output, measure_ceilings(logs), _plain(options))
                    report.announce(planned, options)
                contenders[:] = [each.alive() for each in contenders]
                budget.next()
                run_heat(heat, contenders, options, report, budget)
        finally:
            _end(contenders)


def _end(contenders: Sequence[Contender]) -> None:
    for contender in contenders:
        contender.end()


def run_heat(
    heat: Heat, contenders: list[Contender], options: argparse.Namespace, report: Report, budget: Budget
) -> None:
    """One workload."""
    size = heat.workload(options)
    shape = contenders[0].architecture.shape.name
    print(f"\n{shape}, {size.micro_batches} x {size.micro_batch} x {size.seq_len} tokens a step", flush=True)
    case = Case(size, contenders, report.ceilings)
    case.prepare()
    seconds = 0.0  # of a round
    for number in range(options.rounds):
        if number > 0 and not budget.allows(seconds):
            print(f"  {number} of {options.rounds} rounds: the budget is {budget.seconds:.0f} s", flush=True)
            break
        start, profile = budget.spent(), number == 0 and not options.no_profile
        for contender in case.round(options.warmup, options.steps, profile=profile):
            report.put(case.row(contender))
        steps = options.warmup + options.steps
        seconds = (budget.spent() - start) * steps / (steps + profile)
        if number == 0:
            report.show(heat)
    for contender in case.contenders:
        report.put(case.row(contender))
    report.show(heat)
    print(f"({budget.spent():.0f} s)", flush=True)


def _print_ceilings(ceilings: dict[str, Any]) -> None:
    if ceilings["gemm"]:
        print(f"copy {ceilings['copy'] / 1e12:.2f} TB/s, GEMM {ceilings['gemm'] / 1e12:.0f} TFLOP/s", flush=True)


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` sets those that are left out to two models on two backends at one length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1b at 4096, Llama and stacked, composer and compile")
    parser.add_argument("--shapes", nargs="+", default=["1b"], help="presets or JSON files (default: 1b)")
    parser.add_argument("--lengths", nargs="+", type=int, help="sequence lengths (default: 4096 8192 32768 16384 2048)")
    parser.add_argument("--models", nargs="+", help=f"of {' '.join(MODELS)}")
    parser.add_argument(
        "--backends",
        nargs="+",
        help=f"of {' '.join(BACKENDS)} compile-bf16 (default: the first four); parts as in composer+loss=linear, a "
        "single model as in compile:llama",
    )
    parser.add_argument("--stack", default=STACKED, help=f"the sequence that is stacked (default: {STACKED})")
    parser.add_argument("--stretch", default=STRETCHED, help=f"the one that is stretched (default: {STRETCHED})")
    parser.add_argument("--step-tokens", type=int, default=65_536, help="tokens of a step (default: 65536)")
    parser.add_argument("--micro-tokens", type=int, help="of a micro-batch (default: 16384, or what fits)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--warmup", type=int, default=1, help="steps of a turn that do not count (default: 1)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn that do (default: 3)")
    parser.add_argument("--together", type=int, default=8, help="contenders that take turns (default: 8)")
    parser.add_argument("--budget", type=float, default=3600, help="seconds, for which rounds are left out, never rows")
    parser.add_argument("--no-profile", action="store_true", help="no breakdown of the step")
    parser.add_argument("--output", type=Path, help="write all figures there as JSON")
    parser.add_argument("--logs", type=Path, help="folder for what the contenders print (default: dropped)")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.lengths = options.lengths or ([4096] if quick else [4096, 8192, 32_768, 16_384, 2048])
    options.models = options.models or (["llama", "stacked"] if quick else list(MODELS))
    options.backends = options.backends or (["composer", "compile"] if quick else list(BACKENDS))
    if quick:
        options.steps = min(options.steps, 2)
    return options


if __name__ == "__main__":
    try:
        run(parse())
    except ComposerError as error:
        print(f"bench_training: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
