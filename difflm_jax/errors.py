"""One kind of error for everything a user can put right, and the one place that prints it."""

import os
import sys
import traceback
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: the message is one line that names the culprit (key, file:line, tensor) and what to do.

    What is not printable in it (names come out of untrusted files) is escaped: it stays one line, and cannot speak to
    the terminal.
    """

    exit_status = 1

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class RunInterruptedError(UserError):
    """The run was asked to stop, and has saved what it had: the same command resumes from there.

    Its exit status is EX_TEMPFAIL of sysexits.h ("try again"), so that a scheduler can tell it from a failure.
    """

    exit_status = 75


def one_line(error: BaseException) -> str:
    """The message of `error` on a single line, for wrapping an error of a library in a `UserError`."""
    return " ".join(str(error).split()) or type(error).__name__


def exit_with_errors(main: Callable[[], int | None], debug_traceback: bool = False) -> int:
    """Runs `main` and returns the exit status: a `UserError` becomes one `error:` line on stderr and its own.

    `debug_traceback` prints the traceback as well. Anything that is not a `UserError` is a defect of ours and is
    raised as it is.
    """
    try:
        return main() or 0
    except UserError as error:
        if debug_traceback:
            traceback.print_exc()
        stopped = isinstance(error, RunInterruptedError)  # in order, with everything saved: no error
        print(error if stopped else f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 130
