"""The two exceptions a user may see. Everything else that escapes is a bug of ours."""


class CompressError(Exception):
    """The user must act: bad input, something that does not fit, NaN, a busy directory.

    Args:
        what: one sentence that says what is wrong.
        hint: what to type or change next.
    """

    exit_code = 2

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class Refused(CompressError):
    """The thing was built, and then failed a gate, a verification or an invariant."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What another library says went wrong, cut to one line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
