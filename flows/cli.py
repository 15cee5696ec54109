"""The `safelight` command. Each command reads its flags, calls one function and shows what came back.

Nothing heavy is imported at the top: `safelight --help` needs neither Prefect, MLflow nor torch.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from components.errors import SafelightError, Stopped
from components.workspace import Workspace
from flows.commands import captions, datasets, models, records, retraining, workspace
from flows.commands.opening import SCHEMA, TERMINATED, told

INTERRUPTED = 130
EXIT_PATIENCE_S = 15.0  # for logs and events on their way to Prefect

COMMANDS = (  # in the order of `safelight --help`
    workspace.demo, workspace.init, workspace.import_config,
    workspace.up, workspace.down, workspace.status, workspace.doctor,
    retraining.plan, captions.caption, retraining.curate, retraining.cache, retraining.retrain, retraining.evaluate,
    retraining.promote, retraining.schedule,
    records.runs, records.show, records.logs, records.stop,
    datasets.diff, datasets.export_dataset, captions.edit_caption, captions.caption_history, datasets.gc,
    models.generate, models.export, models.pretrain,
)  # fmt: skip
STUDIES = (models.samplers,)

app = typer.Typer(
    name="safelight",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a folder of captioned pictures to a fine-tuned, evaluated,"
    " reviewed and registered image model, again and again, on a schedule.",
)
studies = typer.Typer(no_args_is_help=True, help="Measure choices on your own data and bases.")
app.add_typer(studies, name="study")
for command in COMMANDS:
    app.command()(command)
for study in STUDIES:
    studies.command()(study)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs a command and turns whatever it raises into one line and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _on_sigterm)
    code = _run(arguments)
    _leave_in_time(code)
    sys.exit(code)


def _leave_in_time(code: int) -> None:
    """End with `code` soon, also where Prefect's client still tries to tell a dead server what happened."""
    sys.stdout.flush()
    overdue = threading.Timer(EXIT_PATIENCE_S, os._exit, [code])
    overdue.daemon = True
    overdue.start()


def _run(arguments: list[str]) -> int:  # noqa: PLR0911
    told.clear()
    try:
        code = app(arguments, prog_name="safelight", standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TyperException as error:
        return _fail(arguments, error.format_message(), error.exit_code)
    except SafelightError as error:
        return _fail(arguments, str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            arguments, "stopped by Ctrl-C; the same command goes on from the last commit", INTERRUPTED, "stopped"
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has left
        return 1
    except Exception as error:
        from components.storage import lack_of_room

        if full := lack_of_room(error, Workspace.from_environment().home):
            return _fail(arguments, str(full), full.exit_code)
        return _fail(arguments, f"{type(error).__name__}: {error} (details: {_keep_traceback()})", 1)
    except BaseException as error:
        if type(error).__name__ != "TerminationSignal":  # Prefect's name for SIGTERM
            raise
        return _fail(arguments, "stopped by a signal", TERMINATED, "stopped")


def _fail(arguments: list[str], message: str, code: int, outcome: str = "failed") -> int:
    line = " ".join(message.split())
    if code in (INTERRUPTED, TERMINATED):
        outcome = "stopped"
    if "--json" in arguments:
        from flows.console import write_document

        write_document({"schema": SCHEMA, "status": outcome, "error": line} | told)
    print(f"error: {line}", file=sys.stderr)
    return code


def _keep_traceback() -> str:
    """Where the traceback was written to; why it was not, when even that cannot be."""
    path = Workspace.from_environment().logs / "safelight.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {' '.join(sys.argv)}\n{traceback.format_exc()}\n")
    except OSError as error:
        return f"not kept, {error}"
    return str(path)


def _on_sigterm(*_: object) -> None:
    raise Stopped("stopped by SIGTERM; the same command goes on from the last commit")


if __name__ == "__main__":
    main()
