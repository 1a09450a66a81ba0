"""``report`` and ``env``: pages and facts to pass on."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from composer_megatron.commands.options import Several, read_named
from composer_megatron.display import console, print_json
from composer_megatron.errors import UsageError


def report(
    study: Positional[Path | None] = None,
    *,
    architecture: Several = (),
    run: Several = (),
    text: Path | None = None,
    plan: Path | None = None,
    seq_len: int = 4096,
    output: Path = Path("report.html"),
) -> None:
    """One self-contained page of a study, its models and their training.

    Args:
        study: Folder of a study.
        architecture: NAME=FILE of an architecture to draw and to count; may be given several times.
        run: NAME=FOLDER of a training run; may be given several times.
        text: The text folder that the runs were trained on, for the unigram line.
        plan: A plan's JSON file.
        seq_len: Tokens in a sequence, for the FLOPs.
        output: The page.
    """
    if study is None and not (architecture or run or plan):
        raise UsageError("nothing to report: name a study, or give --architecture, --run or --plan")
    from composer_search.report import ReportInputs, write_report

    inputs = ReportInputs(
        study=study,
        architectures=read_named(architecture, "--architecture"),
        runs=read_named(run, "--run"),
        text=text,
        plan=plan,
        seq_len=seq_len,
    )
    write_report(inputs, output)
    console.print(f"written to {output}")


def env(*, json: bool = False) -> None:
    """Show versions and devices, for bug reports.

    Args:
        json: Print one JSON object for programs instead of text.
    """
    from composer_megatron.env import environment

    found = environment()
    if json:
        print_json(found)
        return
    for key in ("python", "platform", "cpu", "cpu_cores"):
        console.print(f"{key:12} {found[key]}")
    for gpu in found["gpus"] or [{"name": "none"}]:
        console.print(f"{'gpu':12} {', '.join(gpu.values())}")
    for name, version in found["packages"].items():
        console.print(f"{name:20} {version or 'not installed'}")
