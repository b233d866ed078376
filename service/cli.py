"""The command `edgekiln`: its commands put together, and what failures look like.

Owns exit codes: 0 done, 1 failed, 2 asked for what cannot work, 130 interrupted. Every failure is a sentence with its
code on standard error, never a traceback. Called as the console script.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
import typer.core
from typer.exceptions import TyperException

from service.commands import catalogue, convert, jobs, prompt, server
from service.commands.interrupts import INTERRUPTED
from service.commands.output import say
from service.errors import EdgeKilnError, InvalidRequest, InvalidSettings, RemoteError, SourceNotFound

_USAGE = 2
_FAILED = 1
#: What the caller must put right before trying again.
_USAGE_ERRORS = (InvalidRequest, InvalidSettings, SourceNotFound)


class _Commands(typer.core.TyperGroup):
    """Turns whatever a command raises into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, TyperException):
            raise
        except EdgeKilnError as error:
            code = error.remote_code if isinstance(error, RemoteError) else error.code
            say(f"{code}: {error.message}")
            raise typer.Exit(_USAGE if isinstance(error, _USAGE_ERRORS) else _FAILED) from None
        except KeyboardInterrupt:
            say(
                "Interrupted. A job that was submitted goes on: `edgekiln jobs` lists it, `edgekiln cancel ID` ends it."
            )
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read the output has seen enough; the interpreter must not try to flush the rest.
            sys.stdout = None
            raise typer.Exit(_FAILED) from None
        except OSError as error:
            say(f"os_error: {error.strerror or error}: {error.filename or 'no file named'}.")
            raise typer.Exit(_FAILED) from None
        except Exception as error:
            if ctx.params.get("show_trace"):
                traceback.print_exc()
            say(
                f"internal_error: Unexpected {type(error).__name__}: {error}. `edgekiln --trace ...` shows where; "
                "please report it."
            )
            raise typer.Exit(_FAILED) from None


app = typer.Typer(
    name="edgekiln",
    cls=_Commands,
    help="Turns model checkpoints into artifacts that phones can run, and proves each one.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(show_trace: bool = typer.Option(False, "--trace", hidden=True)) -> None:
    """Turns model checkpoints into artifacts that phones can run, and proves each one."""


app.command(epilog=convert.EPILOG)(convert.convert)
app.command(epilog=prompt.EPILOG)(prompt.run)
app.command(epilog=server.UP_EPILOG)(server.up)
app.command(epilog=jobs.SUBMIT_EPILOG)(jobs.submit)
app.command(epilog=jobs.JOBS_EPILOG)(jobs.jobs)
app.command(epilog=jobs.JOB_EPILOG)(jobs.job)
app.command(epilog=jobs.CANCEL_EPILOG)(jobs.cancel)
app.command(epilog=jobs.RETRY_EPILOG)(jobs.retry)
app.command(epilog=jobs.LOGS_EPILOG)(jobs.logs)
app.command(epilog=jobs.DOWNLOAD_EPILOG)(jobs.download)
app.command(epilog=catalogue.RECIPES_EPILOG)(catalogue.recipes)
app.add_typer(server.keys, name="keys")
app.command()(server.migrate)
app.command()(catalogue.version)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
