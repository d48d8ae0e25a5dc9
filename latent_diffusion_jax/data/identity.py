"""What the data of a source are, in which order, as a short text that a checkpoint can keep."""

import hashlib
from collections.abc import Iterable


def digest(parts: Iterable[str]) -> str:
    """16 hexadecimal digits that stand for some names in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") + b"\0")  # names of files have no 0
    return found.hexdigest()[:16]
