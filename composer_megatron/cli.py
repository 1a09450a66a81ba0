"""The program ``composer-megatron``: finds the command, runs it, and turns errors into one message and a status."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import traceback

import tyro
from tyro.extras import SubcommandApp

from composer_megatron import __version__
from composer_megatron.commands.bench import bench_kernels, bench_training
from composer_megatron.commands.bench_inference import bench_inference
from composer_megatron.commands.bench_report import bench_report
from composer_megatron.commands.convert import export, import_
from composer_megatron.commands.evaluate import eval_
from composer_megatron.commands.evidence import (
    evidence_ablation,
    evidence_agreement,
    evidence_growth,
    evidence_oracle,
    evidence_regret,
    evidence_standing,
    evidence_votes,
)
from composer_megatron.commands.extrapolate import aggregate, extrapolate
from composer_megatron.commands.generate import generate
from composer_megatron.commands.kv import kv
from composer_megatron.commands.plan import plan, profile
from composer_megatron.commands.recipes import recipe_flags, recipe_list, recipe_show, recipe_train
from composer_megatron.commands.repeat import repeat
from composer_megatron.commands.report import env, report
from composer_megatron.commands.search import search, watch
from composer_megatron.commands.systems import systems
from composer_megatron.commands.text import text_check
from composer_megatron.commands.train import flags, train
from composer_megatron.errors import ComposerError, UsageError

COMMANDS = (
    search,
    watch,
    aggregate,
    extrapolate,
    plan,
    profile,
    systems,
    kv,
    recipe_list,
    recipe_show,
    recipe_flags,
    recipe_train,
    train,
    repeat,
    flags,
    text_check,
    eval_,
    generate,
    export,
    import_,
    bench_training,
    bench_kernels,
    bench_report,
    bench_inference,
    evidence_oracle,
    evidence_regret,
    evidence_agreement,
    evidence_standing,
    evidence_ablation,
    evidence_votes,
    evidence_growth,
    report,
    env,
)
"""Every command, in the order in which help lists them. A trailing underscore is no part of a command's name."""

GROUPS = {
    "bench": "Measure on this machine.",
    "evidence": "What scores, proposers and aggregators are worth.",
    "text": "Token files to train on.",
    "recipe": "Pretraining runs that have a name: the paper's and yours.",
}
"""Groups of commands and their help: ``bench_training`` is ``bench training``, listed below ``bench``."""

DESCRIPTION = (
    f"composer-megatron {__version__}: search hybrid architectures, train them on Megatron-core. "
    "Add --debug to any command for the traceback of an error."
)


def _program() -> tuple[SubcommandApp, list[str]]:
    """The commands, and their names."""
    app, groups = SubcommandApp(), {name: SubcommandApp() for name in GROUPS}
    names = []
    for command in COMMANDS:
        name = command.__name__.strip("_")
        group, _, rest = name.partition("_")
        if group in groups:
            groups[group].command(name=rest)(command)
            app.command(groups[group], name=group, help=GROUPS[group])
            name = group
        else:
            app.command(name=name)(command)
        names.append(name)
    return app, names


def _check_command(arguments: list[str], names: list[str]) -> None:
    """Answer a mistyped command with the one that was meant."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        near = difflib.get_close_matches(arguments[0], names, n=1, cutoff=0.65)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(names)}"
        raise UsageError(f"unknown command {arguments[0]!r}: {hint}")


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit: 0 done, 1 failed, 2 wrong usage. Errors are one message on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours = [argument for argument in arguments[:end] if argument != "--debug"]
    debug = len(ours) < end
    if arguments[end + 1 :]:
        ours.append(f"--megatron-flags={shlex.join(arguments[end + 1 :])}")
    app, names = _program()
    try:
        _check_command(ours, names)
        app.cli(prog="composer-megatron", description=DESCRIPTION, args=ours, config=(tyro.conf.FlagCreatePairsOff,))
    except ComposerError as error:
        if debug:
            traceback.print_exc()
        print(f"composer-megatron: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("composer-megatron: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
