"""launch/local.py as a module, which is a script beside the package."""

import importlib.util
import pathlib
from types import ModuleType

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "local.py"


def load() -> ModuleType:
    """A new one for each call."""
    spec = importlib.util.spec_from_file_location("local", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
