"""Whether this process was asked to stop, for those that wait for what may never come.

It is a plain flag, as handlers of signals must not take a lock that what they interrupt may hold.
"""

_asked = [False]


class Stopped(Exception):
    """A stop was asked for in the middle of work that the next start does anew."""


def ask(asked: bool = True) -> None:
    """Notes it; False from the end of `commands.StopRequest` on."""
    _asked[0] = asked


def asked() -> bool:
    """Whether it was."""
    return _asked[0]
