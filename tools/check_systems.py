"""What of each system of `composer_megatron.systems` runs: the evidence behind ``composer-megatron systems``.

::

    python tools/check_systems.py --write

computes, at a tiny shape on CPUs, whether a system's loss falls in training, whether tensor and pipeline parallelism
over two processes give one process's losses, gradients and checkpoint (`compare_layouts`), and whether its weights go
to Hugging Face names. Without ``--write`` it says what differs from ``composer_megatron/systems.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_layouts import compare
from layout_cases import SHAPE, Case

from composer_megatron.errors import UsageError
from composer_megatron.files import read_json, write_json
from composer_megatron.systems import EVIDENCE, LAYOUTS, SYSTEMS

TOLERANCE = 1e-5
"""Of gradients in float64, relative to the largest: losses over a split vocabulary, routers, and Mamba-2's decays are
computed in fp32, and what a router rounds passes through all later ones."""

PAIRS = 3
"""Of the baseline at this shape, so that the systems have 5 to 14 blocks."""


def evidence() -> dict[str, dict[str, bool]]:
    """For each system what runs."""
    shape = dataclasses.replace(SHAPE, baseline_pairs=PAIRS)
    letters = {name: system.sequence(shape).letters for name, system in SYSTEMS.items()}
    results = compare([Case(text, layout) for text in letters.values() for layout in LAYOUTS.values()])  # forks first
    found = {name: {"trains": _trains(text), "exports": _exports(text)} for name, text in letters.items()}
    for result in results:
        name = next(name for name, text in letters.items() if text == result.case.sequence)
        heading = next(heading for heading, layout in LAYOUTS.items() if layout == result.case.layout)
        found[name][heading] = result.within(TOLERANCE)
    return found


def _model(letters: str) -> Any:
    import torch
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from composer_megatron.model import build_model

    torch.set_num_threads(1)
    destroy_moe_metrics_tracker()  # it is as long as the first model of a process is deep
    return build_model(Case(letters, "TP1").architecture, max_sequence_length=16)


def _trains(letters: str) -> bool:
    """Whether ten steps of Adam on one batch take a tenth off the loss."""
    import torch

    model = _model(letters)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens = torch.randint(SHAPE.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    places = torch.arange(16).expand(2, 16)
    losses = []
    for _ in range(10):
        loss = model(tokens[:, :-1], places, None, labels=tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < 0.9 * losses[0]


def _exports(letters: str) -> bool:
    """Whether all weights have names in a Hugging Face model."""
    from composer_megatron.export_hf import hf_weights

    architecture = Case(letters, "TP1").architecture
    try:
        weights = hf_weights(_model(letters), architecture)
    except UsageError:
        return False
    return sum(weight.numel() for weight in weights.values()) == architecture.params_total


def main(argv: Sequence[str] | None = None) -> int:
    """Compute, and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {EVIDENCE.name}")
    parser.add_argument("--json", type=Path, help="also write what was found there")
    options = parser.parse_args(argv)
    found = evidence()
    if options.json:
        write_json(options.json, found)
    if options.write:
        write_json(EVIDENCE, found)
        return 0
    written = read_json(EVIDENCE, "the evidence on systems")
    different = [name for name in SYSTEMS if found[name] != written.get(name)]
    for name in different:
        print(f"{name}: is {found[name]}, {EVIDENCE.name} says {written.get(name)}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
