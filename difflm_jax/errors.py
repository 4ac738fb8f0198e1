"""The error class for problems that a user can fix, and the function that prints it."""

import os
import sys
import traceback
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: the message is one line that names the cause (key, file:line, tensor) and what to do.

    Non-printable characters are escaped, because names come from untrusted files. So the message stays one line and
    cannot send control sequences to the terminal.
    """

    exit_status = 1

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class RunInterruptedError(UserError):
    """The run was asked to stop and has saved its state; the same command resumes it.

    The exit status is EX_TEMPFAIL of sysexits.h ("try again"), which lets a scheduler tell it from a failure.
    """

    exit_status = 75


def one_line(error: BaseException) -> str:
    """Returns the message of `error` on one line, to wrap a library's error in a `UserError`."""
    return " ".join(str(error).split()) or type(error).__name__


def exit_with_errors(main: Callable[[], int | None], debug_traceback: bool = False) -> int:
    """Runs `main` and returns the exit status. A `UserError` prints one `error:` line on stderr and sets the status.

    `debug_traceback` also prints the traceback. Any other exception is a bug in this library and is not caught.
    """
    try:
        return main() or 0
    except UserError as error:
        if debug_traceback:
            traceback.print_exc()
        stopped = isinstance(error, RunInterruptedError)  # a clean stop with everything saved is no error
        print(error if stopped else f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except BrokenPipeError:  # the reader of our output has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 130
