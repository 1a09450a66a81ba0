"""The live view of a search in a terminal: of this process's own search, or of a study that another process writes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from composer_megatron.errors import FileError
from composer_search.effort import Effort, effort
from composer_search.lines import trial_line
from composer_search.study import Study

if TYPE_CHECKING:
    from composer_search.proposers import Proposal
    from composer_search.strategies import Progress

_BEST = 8
_SPARKS = "▁▂▃▄▅▆▇█"
_TILES = {"A": "white on blue", "M": "black on yellow"}


def render(study: Study, running: Sequence[Proposal] | None, *, width: int = 100) -> RenderableType:
    """A study as it stands: progress, cost so far and to go, scores in order, the best trials, and what runs now.

    Args:
        study: The study.
        running: Trials under way; None where they are not known, as for another process's study.
        width: Columns of the terminal.
    """
    parts: list[RenderableType] = [_head(study), _bar(study, width)]
    scores = [trial.score for trial in study.trials if trial.score is not None]
    if scores:
        parts += [_sparkline(scores, width), _best(study)]
    failed = [trial for trial in study.trials if trial.score is None]
    if failed:
        words = (
            f"{len(failed)} failed; the last one, trial {failed[-1].trial} {failed[-1].sequence}: {failed[-1].error}"
        )
        parts.append(Text(words, style="red", overflow="ellipsis", no_wrap=True))
    if running is not None:
        names = ", ".join(str(proposal.sequence) for proposal in running)
        parts.append(Text(f"running  {names or 'nothing'}", style="dim", overflow="ellipsis", no_wrap=True))
    return Group(*parts)


@contextlib.contextmanager
def live_view(console: Console | None = None) -> Iterator[Progress]:
    """A `composer_search.strategies.Progress` that keeps the whole view on a terminal.

    On what is no terminal, a line for each finished trial.
    """
    from rich.live import Live

    console = console or Console(highlight=False)
    if not console.is_terminal:
        from composer_search.strategies import progress_bar

        with progress_bar(console) as progress:
            yield progress
        return
    with Live(console=console, auto_refresh=False) as live:

        def show(study: Study, running: Sequence[Proposal]) -> None:
            live.update(render(study, running, width=console.width), refresh=True)

        yield show


def watch(
    path: Path | str,
    console: Console | None = None,
    *,
    seconds: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Study:
    """Follow a study until its budget is spent; Ctrl-C ends it earlier. Nothing of the study is touched.

    Args:
        path: The study's folder.
        console: Where to show it; on what is no terminal, a line for each finished trial.
        seconds: Between looks.
        sleep: How to wait.

    Returns:
        The study as it was last seen.

    Raises:
        FileError: If there is no study, or a file of it is corrupt.
    """
    console = console or Console(highlight=False)
    view = _watch_terminal if console.is_terminal else _watch_lines
    return view(Path(path), console, seconds, sleep)


def _watch_terminal(path: Path, console: Console, seconds: float, sleep: Callable[[float], None]) -> Study:
    from rich.live import Live

    study = Study.load(path)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            done = effort(study)
            view = Group(render(_at_work(study, done), None, width=console.width), Text(_silence(done), style="dim"))
            live.update(view, refresh=True)
            if done.left == 0:
                return study
            sleep(seconds)
            study = _again(study)


def _watch_lines(path: Path, console: Console, seconds: float, sleep: Callable[[float], None]) -> Study:
    study, told = Study.load(path), 0
    while True:
        done = effort(study)
        for trial in done.trials[told:]:
            console.print(trial_line(trial), markup=False)
        told = len(done.trials)
        if done.left == 0:
            return study
        sleep(seconds)
        study = _again(study)


def _again(study: Study) -> Study:
    """The study as it is now; as it was, where it cannot be read at this moment because it is being written."""
    try:
        return Study.load(study.path)
    except FileError:
        if not (study.path / "study.json").exists():
            raise
        time.sleep(0.05)
        return Study.load(study.path)


def _at_work(study: Study, done: Effort) -> Study:
    """The study of the step that an incremental search is at, or the study itself where there is none yet."""
    folder = study.path / f"step-{done.current + 1:02}"
    return Study.load(folder) if len(done.stages) > 1 and (folder / "study.json").exists() else study


def _head(study: Study) -> Text:
    settings = study.settings
    words = Text(str(study.path), style="bold")
    by = f"  {settings.space}, {settings.proposer}, {settings.evaluator.get('name', 'evaluator')}"
    return words.append(by, style="dim")


def _bar(study: Study, width: int) -> RenderableType:
    whole = effort(study)
    done, left, steps = len(whole.trials), whole.left, len(whole.stages)
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(1, done + left), completed=done, width=max(5, min(40, width - 25)))
    grid.add_row(bar, f"{done} of {done + left} trials" + (f", step {whole.current + 1} of {steps}" * (steps > 1)))
    if whole.to_go is None:
        return grid
    words = f"{whole.spent / done:.1f} s each; {_time(whole.spent)} spent, {_time(whole.to_go)} to go for one worker"
    return Group(grid, Text(words, style="dim"))


def _sparkline(scores: Sequence[float], width: int) -> Text:
    """The last scores in the order of the log, from the lowest to the highest of the study."""
    low, high = min(scores), max(scores)
    shown = scores[-max(1, width - 24) :]
    steps = [round((score - low) / (high - low) * (len(_SPARKS) - 1)) if high > low else 3 for score in shown]
    line = Text(f"{low:.3f} ", style="dim")
    return line.append("".join(_SPARKS[step] for step in steps), style="cyan").append(f" {high:.3f}", style="dim")


def _best(study: Study) -> Table:
    """The trials of the highest value of the objective; where it is no plain accuracy, the value too."""
    plain = study.settings.criteria.objective.plain
    table = Table(box=None, pad_edge=False)
    for heading in ("trial", *([] if plain else ["value"]), "score", "±", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("by")
    table.add_column("sequence", no_wrap=True, overflow="ellipsis")
    order = sorted(study.completed, key=lambda trial: (-(trial.value or 0.0), trial.trial))
    for trial in order[:_BEST]:
        spread = f"{trial.spread:.4f}" if len(trial.seed_scores) > 1 else "–"
        cells = [str(trial.trial), *([] if plain else [f"{trial.value:.4f}"]), f"{trial.score:.4f}", spread]
        table.add_row(*cells, f"{trial.seconds:.1f}", trial.proposer, _tiles(trial.sequence.letters))
    return table


def _tiles(letters: str) -> Text:
    text = Text()
    for letter in letters:
        text.append(letter, style=_TILES.get(letter, "reverse"))
    return text


def _silence(done: Effort) -> str:
    """How long ago the last trial ended, which shows whether anyone is still at work."""
    if done.left == 0:
        return "the budget is spent"
    if not done.trials:
        return "no trial has ended yet; Ctrl-C ends this view"
    try:
        ended = max(datetime.fromisoformat(trial.finished) for trial in done.trials)
        ago = _time(max(0.0, (datetime.now(UTC) - ended).total_seconds()))
    except (ValueError, TypeError):  # a log from elsewhere
        ago = "some time"
    return f"the last trial ended {ago} ago; Ctrl-C ends this view and leaves the search alone"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
