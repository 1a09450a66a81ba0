"""``recipe list``, ``show``, ``flags`` and ``train``: pretraining runs that have a name."""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import filesize
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

from composer_megatron.architecture import Architecture
from composer_megatron.commands.options import shell_words
from composer_megatron.display import console, print_costs, print_json, print_stages
from composer_megatron.errors import UsageError
from composer_megatron.recipes.changes import apply
from composer_megatron.recipes.recipe import Recipe

if TYPE_CHECKING:
    from composer_megatron.pipeline import Plan


def recipe_list(*, json: bool = False) -> None:
    """List the recipes and what each is.

    Args:
        json: Print one JSON list for programs instead of text.
    """
    from composer_megatron.recipes.catalogue import RECIPES

    if json:
        print_json([recipe.as_dict() for recipe in RECIPES.values()])
        return
    table = Table(box=None)
    for heading in ("recipe", "params", "tokens", "steps", "FLOPs", "what"):
        table.add_column(heading, justify="left" if heading in ("recipe", "what") else "right", no_wrap=True)
    for recipe in RECIPES.values():
        parameters, tokens = recipe.architecture.params_total / 1e9, recipe.tokens / 1e9
        counts = f"{parameters:.2f}B", f"{tokens:.1f}B", f"{recipe.steps:,}", f"{recipe.flops:.1e}"
        table.add_row(recipe.name, *counts, recipe.about)
    console.print(table)


def recipe_show(
    name: Positional[str],
    changes: Positional[tuple[str, ...]] = (),
    *,
    gpus: tuple[int, ...] = (1, 8, 64),
    device: str = "h100",
    json: bool = False,
) -> None:
    """Show a recipe: each value with its source, what the model costs, and layouts for numbers of GPUs.

    Args:
        name: A recipe, or FILE.py:NAME for one of your own.
        changes: field=value, such as tokens=1e9; sizes of a layout (tp=2) instead of the planner's choice.
        gpus: Numbers of GPUs to lay it out on.
        device: h100, h200 or a100.
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.planner.estimate import summary
    from composer_megatron.recipes.catalogue import find_recipe
    from composer_megatron.recipes.layouts import lay_out
    from composer_megatron.roofline import get_device

    request, hardware = apply(find_recipe(name), changes), get_device(device)
    recipe = request.recipe
    found: dict[int, Plan | UsageError] = {}
    for count in gpus:
        try:
            found[count] = lay_out(recipe, count, hardware, request.layout)
        except UsageError as error:
            found[count] = error
    if json:
        layouts = [
            {"gpus": count} | ({"problem": str(each)} if isinstance(each, UsageError) else summary(each))
            for count, each in found.items()
        ]
        costs = recipe.architecture.summary(recipe.seq_len)
        print_json(recipe.as_dict() | {"costs": costs, "device": device, "layouts": layouts})
        return
    _print_fields(recipe)
    print_costs(recipe.architecture, recipe.seq_len)
    _print_layouts(recipe, device, found)


def recipe_flags(
    name: Positional[str],
    changes: Positional[tuple[str, ...]] = (),
    *,
    gpus: int,
    architecture: Path,
    device: str = "h100",
    json: bool = False,
) -> None:
    """Print the flags of a recipe for torchrun ... -m composer_megatron.train, one a line; writes its architecture.

    Text and run folder are yours to add. For several nodes: run it once, and give every node the same flags.

    Args:
        name: A recipe, or FILE.py:NAME for one of your own.
        changes: field=value, such as tokens=1e9; sizes of a layout (tp=2) instead of the planner's choice.
        gpus: Processes of the whole run.
        architecture: Where to write the architecture file; another one there is refused.
        device: h100, h200 or a100, for the planner.
        json: Print a JSON list of arguments instead.
    """
    from composer_megatron.recipes.catalogue import find_recipe
    from composer_megatron.recipes.layouts import lay_out, run_flags, tokens_of
    from composer_megatron.roofline import get_device

    request = apply(find_recipe(name), changes)
    found = lay_out(request.recipe, gpus, get_device(device), request.layout)
    _write(request.recipe.architecture, architecture)
    arguments = tokens_of(run_flags(request.recipe, found, architecture))
    if json:
        print_json(arguments)
    else:
        print("\n".join(arguments))


def recipe_train(
    name: Positional[str],
    changes: Positional[tuple[str, ...]] = (),
    *,
    text: tuple[Path, ...],
    run_dir: Path,
    processes: int = 1,
    device: str = "h100",
    dry_run: bool = False,
    megatron_flags: str = "",
) -> None:
    """Pretrain by a recipe on this machine, with the layout that the planner chooses; the same command again resumes.

    On several nodes: recipe flags, and torchrun ... -m composer_megatron.train on each.

    Args:
        name: A recipe, or FILE.py:NAME for one of your own.
        changes: field=value, such as tokens=1e9; sizes of a layout (tp=2) instead of the planner's choice.
        text: Folders made by tools/preprocess_text.py; other texts by flags after a lone --, as for train.
        run_dir: Where checkpoints, metrics and logs go.
        processes: Processes on this machine, one a GPU.
        device: h100, h200 or a100, for the planner.
        dry_run: Check, print the plan and the command, and start nothing.
        megatron_flags: Further flags for Megatron, which win over ours, as one quoted text or after a lone --.
    """
    from composer_megatron.launch import run_to_the_end, torchrun
    from composer_megatron.planner.estimate import summary
    from composer_megatron.recipes.catalogue import find_recipe
    from composer_megatron.recipes.layouts import lay_out, run_flags, tokens_of
    from composer_megatron.roofline import get_device

    request = apply(find_recipe(name), changes)
    recipe, file = request.recipe, run_dir / "architecture.json"
    found = lay_out(recipe, processes, get_device(device), request.layout)
    flags = run_flags(recipe, found, file)
    further = ["--text", *map(str, text), "--run-dir", str(run_dir), *shell_words(megatron_flags)]
    _check(recipe, flags, further, processes)
    command = torchrun(processes, [*tokens_of(flags), *further])
    if dry_run:
        print_costs(recipe.architecture, recipe.seq_len)
        print_stages(summary(found))
        print(shlex.join(command))
    else:
        _write(recipe.architecture, file)
        run_to_the_end(command, processes, run_dir, recipe.steps)


def _check(recipe: Recipe, flags: dict[str, Any], further: list[str], processes: int) -> None:
    """All that the run itself checks before it starts, writing nothing: with a copy of its architecture file."""
    from composer_megatron.arguments import parse_options
    from composer_megatron.recipes.layouts import tokens_of
    from composer_megatron.train import megatron_command_line

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "architecture.json"
        recipe.architecture.save(copy)
        arguments = tokens_of(flags | {"--architecture": copy})
        megatron_command_line(parse_options([*arguments, *further]), processes)


def _write(architecture: Architecture, path: Path) -> None:
    """Write an architecture file, but never over another model's."""
    from composer_megatron.guards import check_same

    if path.exists():
        check_same(Architecture.load(path), architecture, path)
    else:
        architecture.save(path)


def _print_fields(recipe: Recipe) -> None:
    table = Table(title=f"{recipe.name}: {recipe.about}", title_justify="left")
    for heading in ("field", "value", "from"):
        table.add_column(heading, overflow="fold")
    for each in dataclasses.fields(recipe):
        if each.name not in ("name", "about", "sources"):
            table.add_row(each.name, escape(_shown(getattr(recipe, each.name))), escape(recipe.source(each.name)))
    console.print(table)
    console.print(
        f"{recipe.steps:,} steps of {recipe.step_tokens:,} tokens, {recipe.warmup_steps:,} of them warm-up and "
        f"{recipe.cooldown_steps:,} cool-down; {recipe.flops:.2e} FLOPs in all"
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return value.notation if hasattr(value, "notation") else str(value.name)


def _print_layouts(recipe: Recipe, device: str, found: dict[int, Plan | UsageError]) -> None:
    from composer_megatron.planner.estimate import estimate

    table = Table(title=f"on {device}: expected, not measured", title_justify="left")
    for heading in ("GPUs", "layout", "memory of the fullest", "tokens/s", "days"):
        table.add_column(heading, justify="left" if heading == "layout" else "right", overflow="fold")
    for gpus, each in found.items():
        if isinstance(each, UsageError):
            table.add_row(str(gpus), escape(str(each)), "-", "-", "-")
            continue
        seconds = estimate(each).seconds
        rate, days = recipe.step_tokens / seconds, recipe.steps * seconds / 86400
        memory = filesize.decimal(max(each.memory_bytes))
        table.add_row(str(gpus), str(each.layout), memory, f"{rate:,.0f}", f"{days:,.1f}")
    console.print(table)
