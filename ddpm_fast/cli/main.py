"""The command line: ddpm-fast sample | train | eval | plot | calibrate | bench | info | collect-env."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import click

from .. import __version__


class _Command(NamedTuple):
    module: str
    name: str  # of the command in the module
    help: str  # as in the list of commands


# A command's module, and with it torch, is imported when the command is used.
_COMMANDS = {
    "sample": _Command("sample", "sample", "Draw images."),
    "train": _Command("train", "train", "Train a network on your images."),
    "eval": _Command("evaluate", "evaluate", "Score drawn images against real ones."),
    "plot": _Command("plot", "plot", "Plot schedules, diffusion processes and training runs."),
    "calibrate": _Command("calibrate", "calibrate_command", "Calibrate activation ranges for FP8."),
    "bench": _Command("bench", "bench", "Benchmark ddpm_fast against its baselines."),
    "info": _Command("info", "info", "Describe a checkpoint and its cost."),
    "collect-env": _Command(
        "info", "collect_env", "Print environment information for bug reports."
    ),
}


class _LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = _COMMANDS[cmd_name]
        return getattr(import_module(f".{command.module}", __package__), command.name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in _COMMANDS.items()])


# both spellings of every flag: --batch-size and --batch_size
_SETTINGS: dict[str, Any] = dict(
    help_option_names=["-h", "--help"],
    token_normalize_func=lambda s: s.replace("_", "-"),
    max_content_width=110,
)


@click.group(cls=_LazyGroup, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="ddpm-fast")
def cli() -> None:
    """Exact and fast sampling from denoising diffusion models."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """The `ddpm-fast` command. Invalid input: one line on stderr and exit code 2; a failed run: one line and 1."""
    try:
        cli.main(arguments, prog_name="ddpm-fast", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (ValueError, OSError) as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):  # before RuntimeError, of which Abort is one
        click.echo("ddpm-fast: interrupted", err=True)
        sys.exit(130)
    except MemoryError as error:
        _fail(f"out of memory: {error}", code=1)
    except RuntimeError as error:
        _fail(str(error), code=1)
    sys.exit(0)


def _fail(message: str, code: int = 2) -> NoReturn:
    click.echo(f"ddpm-fast: error: {' '.join(message.split())}", err=True)
    sys.exit(code)
