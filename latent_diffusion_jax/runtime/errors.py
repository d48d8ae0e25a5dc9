"""The one exception for what a user can put right: bad configs, data, checkpoints, arguments."""

import contextlib
import re
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Says in one line what was wrong, where, and what would be right.

    Commands print the message without a traceback and exit with its status.
    """

    status = 2


class StorageError(UserError):
    """A folder that was there cannot be written or read any more; another try may do later."""

    status = 74  # EX_IOERR of sysexits.h


class DataError(StorageError):
    """Examples that could be read cannot be read any more."""


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turns what a constructor says of its arguments into a UserError that starts with `what`."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what}: {reason}") from error


def verbose() -> bool:
    """Whether --verbose was given; also before flags are parsed, and where they cannot be."""
    given = [arg.lstrip("-") for arg in sys.argv[1:] if re.match("--?(no)?verbose(=|$)", arg)]
    return bool(given) and given[-1].lower() in ("verbose", "verbose=true", "verbose=1")
