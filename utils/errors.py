"""The one error that is the user's to mend."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input: a task, file, flag or device that cannot be used.

    Its message is one line that says what is wrong and what to do about it; the command line prints that line
    and ends with exit code 2, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # what it quotes, a path or another error, may have several lines
