"""The one base of errors that are the user's to mend: shown as a message without a traceback."""


class UserError(Exception):
    """Something outside the code is wrong. The message names the thing, the place and the remedy."""
