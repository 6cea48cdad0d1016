"""Act on a module as soon as it is imported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from typing_extensions import override

_logger = logging.getLogger("rankload")

OnImport = Callable[[ModuleType], None]


class ImportHook(MetaPathFinder):
    """Calls a function with each of some modules: at once if the module is imported already, else after its import.

    A function that fails is logged, and does not spoil the import.

    Args:
        actions: functions by module name.
    """

    def __init__(self, actions: Mapping[str, OnImport]) -> None:
        self._actions = dict(actions)

    def install(self) -> None:
        """Act on imported modules, and on the others from now on."""
        sys.meta_path.insert(0, self)
        for name, action in self._actions.items():
            if (module := sys.modules.get(name)) is not None:
                _act(action, module)

    def remove(self) -> None:
        """Act on no further module."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module as Python does by default, and let its loader call the function."""
        action = self._actions.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if action is not None else None
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, action)  # type: ignore[arg-type]
        return spec


class _ActingLoader(Loader):
    """A module's own loader, followed by the function. Afterwards the module names its own loader."""

    def __init__(self, loader: Loader, action: OnImport) -> None:
        self._loader, self._action = loader, action

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    @override
    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _act(self._action, module)


def _act(action: OnImport, module: ModuleType) -> None:
    try:
        action(module)
    except Exception as error:  # a version with other inner names
        text = "%s is left alone: this version is not known (%s: %s)"
        _logger.warning(text, module.__name__, type(error).__name__, error)
