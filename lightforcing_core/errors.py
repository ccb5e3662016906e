"""Errors that a user can act on."""


class UserError(Exception):
    """Bad input or an impossible request.

    The message is one line that names the thing, what was expected, what came and what to do.
    The command line prints it on stderr and exits with status 2.
    """


class Cancelled(Exception):
    """The run was stopped between two forwards at the caller's request."""
