"""Things of the user's own, named `package.module:thing` in the configuration."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from distal.errors import ModelError


def load(name: str, key: str) -> Any:
    """Load a function or a class by its name; modules beside the configuration are found as well.

    Args:
        key: of the configuration, for messages.

    Raises:
        ModelError: it cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` would find it
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"{key}: module {module_name!r} cannot be imported ({error})") from error
    thing = getattr(module, attribute, None)
    if not callable(thing):
        raise ModelError(f"{key}: module {module_name!r} has no function or class {attribute!r}")
    return thing
