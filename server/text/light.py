"""A module of transformers, imported without the packages around it.

transformers reads what every model's files define, so that any of their names can be asked of it, and its
``utils`` import the hub's client. That is half a second to more than one of processor time at each start, for
processes that need one module, which has no need of these.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import ModuleType

_PACKAGE = "transformers"


def alone(name: str) -> ModuleType:
    """A module, imported while empty packages stand in for those around it, unless these are there.

    The packages are not imported after that; what the module has imported stays, and transformers works with
    it if it is imported later. Meanwhile no other thread may import it.

    Args:
        name: of the module, with its packages.

    Raises:
        ImportError: transformers has no such module.
    """
    if _PACKAGE not in sys.modules:
        try:
            return _alone(name)
        except Exception:  # another version, whose module needs the packages
            for each in [each for each in sys.modules if each.split(".")[0] == _PACKAGE]:
                del sys.modules[each]
    return importlib.import_module(name)


def _alone(name: str) -> ModuleType:
    parts = name.split(".")
    packages = [".".join(parts[:count]) for count in range(1, len(parts))]
    try:
        for package in packages:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            empty = importlib.util.module_from_spec(spec)
            empty.__dict__["__version__"] = importlib.metadata.version(_PACKAGE)
            sys.modules[package] = empty
        return importlib.import_module(name)
    finally:
        for package in packages:
            sys.modules.pop(package, None)
