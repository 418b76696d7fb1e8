"""Command line `ddpm-fast`: the group of commands, and exit codes."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NamedTuple, NoReturn

import click

from .. import __version__
from .common import printable
from .interrupts import INTERRUPTED, import_interruptibly


class _Command(NamedTuple):
    module: str
    name: str  # of the command in the module
    help: str  # as in the list of commands


# Errors of a run, not of its arguments.
_RUN_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM)
_LONGEST = 600  # characters of an error message; the middle of a longer one is left out

# A command's module is imported when the command is used, torch after options have been parsed.
_COMMANDS = {
    "sample": _Command("sample", "sample", "Draw images."),
    "train": _Command("train", "train", "Train a network on your images."),
    "eval": _Command("evaluate", "evaluate", "Compare samples with real images."),
    "convert": _Command("convert", "convert", "Convert a checkpoint of another codebase."),
    "plot": _Command("plot", "plot", "Plot schedules, diffusion processes and training runs."),
    "calibrate": _Command("calibrate", "calibrate_command", "Calibrate activation ranges for FP8."),
    "bench": _Command("bench", "bench", "Benchmark ddpm_fast against its baselines."),
    "info": _Command("info", "info", "Describe a checkpoint and its cost."),
    "collect-env": _Command(
        "info", "collect_env", "Print environment information for bug reports."
    ),
}


class _LazyGroup(click.Group):
    """Command group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = _COMMANDS[cmd_name]
        module = import_interruptibly(f".{command.module}", __package__)
        return getattr(module, command.name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line
            raise click.Abort from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in _COMMANDS.items()])


_SETTINGS: dict[str, Any] = dict(
    help_option_names=["-h", "--help"],
    token_normalize_func=lambda s: s.replace("_", "-"),  # --batch-size and --batch_size
    max_content_width=110,
)


@click.group(cls=_LazyGroup, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="ddpm-fast")
def cli() -> None:
    """Exact and fast sampling from denoising diffusion models."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the `ddpm-fast` command.

    Exit codes: 0 for success; 2 for invalid input and 1 for a failed run, each with one line on
    stderr; 128 + the signal's number after a signal: 130 for SIGINT (Ctrl-C), 143 for SIGTERM.
    """
    try:
        cli.main(arguments, prog_name="ddpm-fast", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except BrokenPipeError:  # the reader of stdout, such as `head`, has ended
        _discard_stdout()
        sys.exit(1)
    except OSError as error:
        if error.errno in _RUN_ERRORS:
            _discard_stdout()
        name = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        code = 1 if error.errno in _RUN_ERRORS else 2
        _fail(f"{name}{error.strerror}" if error.strerror else str(error), code)
    except ValueError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):  # before RuntimeError, of which Abort is one
        click.echo("ddpm-fast: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except MemoryError as error:
        _fail(f"out of memory: {error}", code=1)
    except RuntimeError as error:
        _fail(str(error), code=1)
    sys.exit(0)


def _fail(message: str, code: int = 2) -> NoReturn:
    message = " ".join(message.split())
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    click.echo(printable(f"ddpm-fast: error: {message}"), err=True)
    sys.exit(code)


def _discard_stdout() -> None:
    """Redirects a stdout that cannot be written to; otherwise Python reports it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
