"""The one error that is the user's to fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: a task, file, flag or device that cannot be used.

    Its message is one line that says what is wrong and what to do about it; the command line prints that line
    and ends with exit code 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # what it quotes, a path or another error, may have several lines


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise as UserError the ValueError of what knows no UserError: settings and agents, which refuse a value.

    So too what arithmetic says of settings that lead to no number.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
    except ArithmeticError as error:
        raise UserError(f"no agent can be made with these settings: {error}") from error
