"""The two kinds of error that Kedge raises on purpose."""


class KedgeError(Exception):
    """What was wrong, where, and the remedy; shown to the user as it is, without a traceback."""


class UserError(KedgeError, ValueError):
    """Something the user wrote cannot be used (exit status 2)."""


class RunError(KedgeError, RuntimeError):
    """Something failed while running (exit status 1)."""
