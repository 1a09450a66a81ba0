"""``eval``: what a trained model is worth, on texts and on tasks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tyro.conf import Positional

from composer_megatron.display import console, print_json
from composer_megatron.errors import UsageError

if TYPE_CHECKING:
    from composer_megatron.evaluate_tasks import TaskScores


def eval_(
    run: Positional[Path],
    *,
    text: tuple[Path, ...] = (),
    tasks: tuple[str, ...] = (),
    task_data: Path | None = None,
    task_path: Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
    iteration: int | None = None,
    json: bool = False,
) -> None:
    """What a run is worth: held-out loss on a text, scores on lm-eval's tasks; writes RUN/eval.json and RUN/tasks.json.

    Args:
        run: Folder of a training run, or of one of its checkpoints.
        text: A text folder (its held-out part is used), or files and folders of plain text: nats and bits per byte.
        tasks: Tasks, groups or tags of lm-eval, such as arc_easy and hellaswag.
        task_data: A folder of JSON lines with the documents of tasks, such as arc_easy_test.jsonl; others are fetched.
        task_path: A folder of further tasks, as YAML files that lm-eval reads.
        fewshot: Solved examples before each document; by default as the task says.
        limit: Documents of each task at most.
        batch_tokens: Tokens in one pass; by default 2048 on a CPU, 16384 on a GPU.
        iteration: Which checkpoint; the last by default.
        json: Print one JSON object for programs instead of text.
    """
    if not text and not tasks:
        raise UsageError("nothing to evaluate on: add --text PATH, or --tasks NAME (such as arc_easy), or both")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; tqdm reads this once, when PyTorch imports it
    from composer_megatron.checkpoint import load_run
    from composer_megatron.evaluate import evaluate_text
    from composer_megatron.evaluate_tasks import evaluate_tasks

    found: dict[str, Any] = {}
    written: list[Path] = []
    with load_run(run, iteration) as loaded:
        if text:
            evaluation = evaluate_text(loaded, text, batch_tokens=batch_tokens)
            written.append(evaluation.save(loaded.path))
            found |= vars(evaluation)
        if tasks:
            scores = evaluate_tasks(
                loaded,
                tasks,
                data=task_data,
                task_path=task_path,
                fewshot=fewshot,
                limit=limit,
                batch_tokens=batch_tokens,
                report=lambda line: print(line, file=sys.stderr, flush=True),
            )
            written.append(scores.save(loaded.path))
            found["tasks"] = [vars(score) for score in scores.scores]
    if json:
        print_json(found)
        return
    if text:
        console.print(f"{evaluation.nats_per_token:.4f} nats a token, {evaluation.bits_per_byte:.4f} bits a byte")
        size = f"{evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes"
        console.print(f"held-out text of {size}; iteration {evaluation.iteration}")
    if tasks:
        print_scores(scores)
    console.print(f"written to {' and '.join(map(str, written))}", markup=False)


def print_scores(scores: TaskScores) -> None:
    """Print a table of the scores."""
    table = Table(title=f"iteration {scores.iteration}", title_justify="left")
    for heading in ("task", "metric", "value", "±", "documents", "shots"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right", no_wrap=True)
    for score in scores.scores:
        error = "" if score.stderr is None else f"{score.stderr:.4g}"
        name = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        table.add_row(score.task, name, f"{score.value:.4g}", error, f"{score.samples:,}", str(score.fewshot))
    console.print(table)
