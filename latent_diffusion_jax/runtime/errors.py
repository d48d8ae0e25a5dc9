"""The one exception for what a user can put right: bad configs, data, checkpoints, arguments."""


class UserError(ValueError):
    """Says in one line what was wrong, where, and what would be right.

    Commands print the message without a traceback and exit with status 2.
    """
