"""The command `sa-convert`: finds its subcommands, and turns errors into one line and an exit status.

Subcommands are imported when they are used or listed, and import heavy libraries in their bodies, so that `--help` and
header-only work stay fast.
"""

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from sa_convert import __version__, registration
from sa_convert.console.printable import one_line
from sa_convert.console.redaction import redact
from sa_convert.errors import EndedElsewhere, SaConvertError
from sa_convert.models.processes import broken

COMMANDS = {
    "inspect": "sa_convert.commands.inspect",
    "analyze": "sa_convert.commands.analyze",
    "convert": "sa_convert.commands.convert",
    "heal": "sa_convert.commands.heal",
    "evaluate": "sa_convert.commands.evaluate",
    "bench": "sa_convert.commands.bench",
    "chat": "sa_convert.commands.chat",
    "audit": "sa_convert.commands.audit",
    "push": "sa_convert.commands.push",
    "recipes": "sa_convert.commands.recipes",
}
"""Name of each subcommand and the module whose `command` it is, in the order of the help."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name]).command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sa-convert")
def cli() -> None:
    """Give Hugging Face checkpoints a smaller KV cache: attention is shared across layers.

    MODEL is a folder in the format of transformers, org/name[@revision] on the Hub, or a .gguf file.

    Exit status: 0 done, 1 an error, 2 wrong usage, 3 the quality gate refused.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors go to stderr as one line."""
    try:
        status = cli.main(None if arguments is None else list(arguments), "sa-convert", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EndedElsewhere as error:
        return error.exit_code
    except SaConvertError as error:
        return _fail(error, str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click takes it for Ctrl-D at a prompt, but we never ask
            return _unexpected(error.__cause__)
        return _fail(error, "Interrupted; nothing was written.", 1)
    except BrokenPipeError:
        # Whoever read our output has seen enough. The interpreter flushes stdout again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: BaseException) -> int:
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _fail(error, f"Unexpected {told} (run again with SA_CONVERT_DEBUG=1 for a traceback to report).", 1)


def _fail(error: BaseException, message: str, status: int) -> int:
    if os.environ.get("SA_CONVERT_DEBUG"):
        click.echo(redact("".join(traceback.format_exception(error))), err=True, nl=False)
    click.echo(f"Error: {one_line(redact(message))}", err=True)
    return status


def main() -> None:
    """Entry point of the script `sa-convert`."""
    registration.cancel()
    status = run()
    if broken():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    gc.freeze()  # Python would search all that was imported for garbage as it ends, for 0.03 s
    sys.exit(status)
