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
from composer_megatron.commands import COMMANDS, GROUPS
from composer_megatron.errors import ComposerError, UsageError

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
