"""The one base of errors that the user can fix: shown as a message without a traceback."""


class UserError(Exception):
    """Something outside the code is wrong. The message names the thing, the place and the remedy."""
