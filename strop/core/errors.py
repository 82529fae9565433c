"""The one exception that a user is meant to see."""


class StropError(Exception):
    """A mistake that the user can mend: one sentence that names the cause and the way out.

    The command line prints it without a traceback and exits with code 2.
    """
