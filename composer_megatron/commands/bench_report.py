"""``bench report``: one page of everything that was measured, and the README's headline figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from composer_megatron.display import console
from composer_megatron.errors import ComposerError, FileError, UsageError
from composer_megatron.files import write_text

_LENGTHS = tuple(2**power for power in range(11, 18))
"""Tokens, 2,048 to 131,072, between which the curve of a Composite's gain is drawn."""

_SHAPES = ("350m", "1b", "3b", "8b")
_CONTEXTS = (4096, 8192, 32_768, 131_072)
_MEMORIES = (80 * 10**9, 141 * 10**9)
"""Bytes of an H100 and of an H200, for the requests that fit."""

if TYPE_CHECKING:
    from composer_megatron.bench.report import Results
    from composer_search.report.benchmarks import Measured


def bench_report(
    results: Positional[Path] = Path("benchmarks/results"),
    *,
    output: Path = Path("runs/bench/report.html"),
    readme: Path | None = None,
    check: bool = False,
) -> None:
    """One page of tables and plots from the result files of all benchmarks.

    Args:
        results: Folder of the results; its JSON files are read, those of folders below it, too.
        output: The page.
        readme: Write the headline figures between the marks of this file instead of a page.
        check: With --readme, write nothing, and fail where the figures there are not those of the results.
    """
    from composer_megatron.bench.headline import headline, split_readme, update_readme
    from composer_megatron.bench.report import read_results
    from composer_search.report.benchmarks import build_page

    if check and readme is None:
        raise UsageError("--check looks at a README: add --readme README.md")
    found = read_results(results)
    if not found.sources:
        raise FileError(
            f"{results} holds no result of a benchmark: composer-megatron bench training (or kernels, inference) makes "
            "some in runs/bench, on a GPU, and a checkout has those of benchmarks/results"
        )
    for said in found.unfair:
        console.print(f"left out of comparisons: {said}")
    if readme is None:
        write_text(output, build_page(measured(found)))
        console.print(f"{len(found.sources)} results; written to {output}")
    elif check:
        if split_readme(readme)[1] != headline(found):
            raise ComposerError(f"the figures in {readme} are not those of {results}: run this without --check")
        console.print(f"the figures in {readme} are those of {results}")
    else:
        changed = update_readme(readme, headline(found))
        console.print(f"{readme} {'has new figures' if changed else 'had these figures already'}")


def measured(found: Results) -> Measured:
    """The results as the page takes them."""
    from composer_megatron.bench.lengths import at_ceilings, gains
    from composer_megatron.bench.report import ratios
    from composer_megatron.commands.kv import models
    from composer_megatron.kv import keeping
    from composer_search.report.benchmarks import Measured

    training = [{**row, "gpu": row["source"].gpu, "file": row["source"].file} for row in found.training]
    pairs = dict.fromkeys((row["gpu"], row["shape"], row["backend"], row["model"]) for row in training)
    curves = {
        f"{shape} {model}, {backend}, {gpu}": ratios(found.training, gpu, shape, backend, model)
        for gpu, shape, backend, model in pairs
        if model != "llama"
    }
    carried = gains(found.training)
    by_name = {gain.name: gain for gain in carried}
    beside = [
        (name, length, ratio, by_name[name].at(length) if name in by_name else None)
        for name, points in curves.items()
        for length, ratio in points
    ]
    bounds = {
        (f"{row['shape']} {row['model']}, {row['backend']}, {row['source'].gpu}", row["seq_len"]): at_ceilings(
            row, found.training
        )
        for row in sorted(found.training, key=lambda row: row.get("tokens_per_second") or 0.0)  # the fastest counts
        if row["model"] != "llama"
    }
    return Measured(
        training=training,
        inference=[{**row, "gpu": row["source"].gpu} for row in found.inference],
        keeping=[vars(keeping(name, each, _CONTEXTS, _MEMORIES)) for name, each in models((), _SHAPES)],
        trials=[{**row, "gpu": row["source"].gpu} for row in found.cache],
        kernels=[{**vars(verdict), "gpu": source.gpu} for verdict, source in found.kernels],
        search=[{**row, "gpu": row["source"].gpu} for row in found.search],
        studies=[
            f"{row['study']}: {row['hours']:.1f} h on one {row['source'].gpu}, predicted from measured steps"
            for row in found.studies
        ],
        ratios={name: points for name, points in curves.items() if len(points) > 1} or curves,
        carried={gain.name: [(length, gain.at(length)) for length in _LENGTHS] for gain in carried},
        explained=[gain.says() for gain in carried if len(gain.lengths) > 1] or [gain.says() for gain in carried],
        gains=[(*each, bounds.get(each[:2])) for each in beside],
        ceilings=found.ceilings,
        sources=[f"{source.file}: {source.kind}, {source.says()}" for source in found.sources],
    )
