"""The command `edgekiln`: its commands put together, and what failures look like.

Owns exit codes: 0 done, 1 failed, 2 asked for what cannot work, 130 interrupted. Every failure is a sentence with its
code on standard error, never a traceback; with `--json` it is a problem document on standard output too. Called as
the console script.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import typer
import typer.core
from typer.exceptions import TyperException

from service.commands import (
    backup,
    benchmarks,
    catalogue,
    choice,
    convert,
    devices,
    health,
    history,
    jobs,
    keys,
    prompt,
    schedules,
    server,
    sweep,
    tenants,
    tokens,
    uploads,
    workers,
)
from service.commands.interrupts import INTERRUPTED
from service.commands.output import format_error, print_json, say
from service.errors import (
    CalibrationInvalid,
    EdgeKilnError,
    EvaluationInvalid,
    InvalidRequest,
    InvalidSettings,
    RemoteError,
    SourceNotFound,
)

_USAGE = 2
_FAILED = 1
#: Key of a context's flag.
_FOR_PROGRAM = "edgekiln.is_for_program"
#: What the caller must put right before trying again.
_USAGE_ERRORS = (CalibrationInvalid, EvaluationInvalid, InvalidRequest, InvalidSettings, SourceNotFound)


class _Commands(typer.core.TyperGroup):
    """Turns whatever a command raises into a sentence and an exit code."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Remember whether a program reads the output, before anything can fail."""
        is_for_program = "--json" in args
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[_FOR_PROGRAM] = is_for_program
        return context

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                # What is still held back may meet a reader that has gone: here that has a name.
                sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except TyperException as error:
            # Typer prints the sentence and the usage.
            _print_problem(ctx, InvalidRequest(error.format_message()))
            raise
        except EdgeKilnError as error:
            _fail(ctx, error, _USAGE if isinstance(error, _USAGE_ERRORS) else _FAILED)
        except KeyboardInterrupt:
            say("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read the output has seen enough; what the interpreter flushes at its end goes nowhere.
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            raise typer.Exit(_FAILED) from None
        except OSError as error:
            sentence = f"{error.strerror or error}: {error.filename or 'no file named'}."
            _fail(ctx, _describe("os_error", sentence), _FAILED)
        except Exception as error:
            if ctx.params.get("show_trace"):
                traceback.print_exc()
            sentence = (
                f"Unexpected {type(error).__name__}: {error}. `edgekiln --trace ...` shows where; please report it."
            )
            _fail(ctx, _describe("internal_error", sentence), _FAILED)


def _describe(code: str, sentence: str) -> EdgeKilnError:
    return RemoteError({"code": code, "message": sentence, "retryable": False, "details": {}})


def _fail(ctx: Any, error: EdgeKilnError, exit_code: int) -> NoReturn:
    _print_problem(ctx, error)
    say(format_error(error.to_json()))
    raise typer.Exit(exit_code) from None


def _print_problem(ctx: Any, error: EdgeKilnError) -> None:
    """Give a program its JSON, whatever happens."""
    if ctx.meta.get(_FOR_PROGRAM):
        print_json(error.to_problem())


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
app.command(epilog=jobs.DELETE_EPILOG)(jobs.delete)
app.command(epilog=jobs.LOGS_EPILOG)(jobs.logs)
app.command(epilog=choice.COMPARE_EPILOG)(choice.compare)
app.command(epilog=choice.PICK_EPILOG)(choice.pick)
app.command(epilog=benchmarks.BENCHMARK_EPILOG)(benchmarks.benchmark)
app.command(epilog=benchmarks.FIT_EPILOG)(benchmarks.fit)
app.command(epilog=jobs.DOWNLOAD_EPILOG)(jobs.download)
app.command(epilog=uploads.UPLOAD_EPILOG)(uploads.upload)
app.command(epilog=catalogue.RECIPES_EPILOG)(catalogue.recipes)
app.add_typer(schedules.schedules, name="schedules")
app.add_typer(workers.workers, name="workers")
app.command(epilog=devices.WORKER_EPILOG)(devices.device_worker)
app.add_typer(devices.devices, name="devices")
app.add_typer(devices.tools, name="tools")
app.command(epilog=history.HISTORY_EPILOG)(history.history)
app.command(epilog=history.DIFFERENCE_EPILOG)(history.difference)
app.add_typer(keys.keys, name="keys")
app.add_typer(tenants.tenants, name="tenants")
app.add_typer(tokens.tokens, name="tokens")
app.command(epilog=sweep.GC_EPILOG)(sweep.gc)
app.command(epilog=backup.BACKUP_EPILOG)(backup.backup)
app.command(epilog=backup.RESTORE_EPILOG)(backup.restore)
app.command()(server.migrate)
app.command(epilog=health.HEALTH_EPILOG)(health.health)
app.command()(catalogue.version)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
