"""Launches of `linear_decode` where they run: ``python benchmarks/tune_decoding.py --output tuned.json``.

A kernel alone does not show what it does to the one after it, which may begin earlier (programmatic dependent launch).
Here the products of a Llama's decoding step, one request and little context, change their launch one after the other,
and the whole step is timed in its CUDA graph; each product keeps its best before the next one is tried. At the end the
best launches of all are timed with every overlap, and with up to 64 requests fused and unfused steps beside each other:
these have a kernel of their own, whose launches `bench_linear_decode.py --tune` times.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
from bench_inference import BF16, DEVICE, IN_GRAPH, ROOM, time_steps
from timing import own_stream

from composer_kernels.linear_decode import Launch, launch_row
from composer_kernels.overlap import Overlap
from composer_megatron.architecture import Architecture
from composer_megatron.env import environment
from composer_megatron.files import write_json
from composer_megatron.inference.engine import Engine
from composer_megatron.inference.weights import Weights, random_weights
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import load_shape

op = importlib.import_module("composer_kernels.linear_decode")  # the function of that name hides it in the package
Product = tuple[int, int, bool]
"""Outputs, inputs, and whether there is a gate."""
CONTEXT = 512
TRIAL = (IN_GRAPH[0], 4)
"""Steps in a sample, and samples, of a launch that is tried."""


class Launches:
    """Stands in for `default_launch`: launches by product in place of the defaults."""

    def __init__(self) -> None:
        """Begin with the defaults."""
        self.default = op.default_launch
        self.chosen: dict[Product, Launch] = {}

    def __call__(self, outputs: int, inputs: int, gated: bool, overlap: Overlap = "none") -> Launch:
        """As `default_launch`."""
        found = self.chosen.get((outputs, inputs, gated))
        if found is None:
            return self.default(outputs, inputs, gated, overlap)
        return dataclasses.replace(found, overlap=overlap)


def products(weights: Weights) -> list[Product]:
    """Those of a step, the one that reads most of all first, and the words last."""
    found = dict.fromkeys(
        product
        for block in weights.blocks
        for product in (
            (len(block.first) // (1 if block.attends else 2), block.first.shape[1], not block.attends),
            (*block.second.shape, False),
        )
    )
    ordered = sorted(found, key=lambda product: -product[0] * product[1] * (1 + product[2]))
    return [*ordered, (*weights.output.shape, False)]


def candidates(product: Product) -> Iterator[Launch]:
    """Launches that give a thread 16 to 64 elements of a block, two to eight accesses."""
    outputs, inputs, gated = product
    for share, block, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (2, 4, 8)):
        elements = share * block * (2 if gated else 1) // (32 * warps)
        if elements in (16, 32, 64) and block <= inputs and share <= outputs:
            yield Launch(share, block, warps)


def compile_all(weights: Weights, overlap: Overlap) -> None:
    """Run every candidate once on all cores; x, norm or residual as the step has them."""
    norms = {product: product[2] or product[0] == len(weights.output) for product in products(weights)}
    norms |= {(len(block.first), block.first.shape[1], False): True for block in weights.blocks if block.attends}

    def run(product: Product, launch: Launch) -> None:
        outputs, inputs, gated = product
        x = torch.ones(1, inputs, dtype=BF16, device=DEVICE)
        weight = torch.empty(outputs * (2 if gated else 1), inputs, dtype=BF16, device=DEVICE)
        norm, residual = (x[0], None) if norms[product] else (None, x.new_ones(1, outputs))
        launch_row(x, weight, norm, weights.epsilon, residual, gated, None, launch)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for product in products(weights):
            for launch in candidates(product):
                pool.submit(run, product, dataclasses.replace(launch, overlap=overlap))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def main() -> None:
    """Run from the command line."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--shape", default="1b")
    options.add_argument("--overlap", choices=get_args(Overlap), help="while launches are tried; by default the best")
    options.add_argument("--budget", type=float, default=60, help="seconds after which no further launch is tried")
    options.add_argument("--output", type=Path, help="write all figures there as JSON, after every step")
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_decoding needs a CUDA GPU, and there is none")
    with own_stream(), torch.no_grad():
        tune(chosen)


def tune(options: argparse.Namespace) -> None:
    """Try everything; print and write as it comes."""
    begin = time.monotonic()
    shape = load_shape(options.shape)
    weights = random_weights(Architecture(CompositeSequence("AM" * shape.baseline_pairs), shape), BF16, DEVICE)
    launches = op.default_launch = Launches()
    rows: list[dict[str, Any]] = []
    facts = {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "environment": environment()}

    def keep(**row: Any) -> None:
        rows.append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if options.output is not None:
            write_json(options.output, {**facts, "rows": rows})

    def step(overlap: Overlap, requests: int = 1, fused: bool = True) -> float:
        engine = Engine(weights, requests, CONTEXT + ROOM, fused=fused, overlap=overlap)
        return round(1e6 * time_steps(engine, CONTEXT, TRIAL), 1)

    by_overlap: dict[Overlap, float] = {each: step(each) for each in get_args(Overlap)}
    for each, us in by_overlap.items():
        keep(product="all", launch="defaults", overlap=each, us=us)
    overlap: Overlap = options.overlap or min(by_overlap, key=by_overlap.__getitem__)
    best = by_overlap[overlap]
    compile_all(weights, overlap)
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    for product in products(weights):
        before = launches.chosen.get(product)
        for launch in candidates(product):
            if time.monotonic() - begin > options.budget:
                break
            launches.chosen[product] = launch
            try:
                us = step(overlap)
            except Exception as failure:  # too many registers for this GPU
                keep(product=product, launch=str(launch), note=f"{type(failure).__name__}: {failure}"[:120])
                continue
            keep(product=product, launch=str(launch), us=us)
            if us < best:
                best, before = us, launch
        launches.chosen.pop(product, None)
        if before is not None:
            launches.chosen[product] = before
        keep(product=product, best=dataclasses.asdict(before) if before else "the default", us=best)
    for each in get_args(Overlap):
        keep(product="all", launch="best", overlap=each, us=step(each))
    for requests, fused in itertools.product((1, 2, 8, 32, 64), (True, False)):
        keep(
            product="all",
            launch="best",
            overlap=overlap,
            requests=requests,
            fused=fused,
            us=step(overlap, requests, fused),
        )
    print(f"{time.monotonic() - begin:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
