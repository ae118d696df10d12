"""Makes Transformers read compressed directories, once it is imported: this room alone starts without it.

Contract: after `import ernie_elastic.compression`, in whatever order and thread, an Auto class of Transformers loads a
compressed directory. Compressing must not pay for that, so the registration waits for the import of Transformers.
"""

from __future__ import annotations

import importlib.machinery
import sys
import threading
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from typing import Any

ROOM = __name__.rpartition(".")[0]
TRANSFORMERS = "transformers"


def register() -> None:
    """Register config, quantizer and experts with Transformers now; a second call changes nothing."""
    from ernie_elastic.compression import config, quantizer

    config.register()
    quantizer.register()


def register_with_transformers() -> None:
    """Register now when Transformers is imported already, else right after somebody imports it."""
    hook = _Hook()
    sys.meta_path.insert(0, hook)  # first the hook, then the look: no import slips between them
    if TRANSFORMERS in sys.modules:
        hook.finish()


class _Hook(MetaPathFinder):
    """Watches imports of Transformers and of this room, and registers when the outermost of them has ended.

    Files of this room import Transformers themselves: while one of them is half made, nothing can be registered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._done = False
        self._looking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """What the other finders find, with a loader that tells this hook of its end; None for all other modules."""
        watched = fullname == TRANSFORMERS or fullname.startswith(f"{ROOM}.")
        if not watched or getattr(self._looking, "now", False):
            return None
        self._looking.now = True  # a finder may ask all finders, this one too
        try:
            others = [finder for finder in sys.meta_path if finder is not self]
            found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._looking.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader, self)
        return spec

    def run(self, loader: Loader, module: types.ModuleType) -> None:
        """Execute a module by its own loader; register when no other watched module is at it."""
        with self._lock:
            self._under_way += 1
        try:
            loader.exec_module(module)
        finally:
            with self._lock:
                self._under_way -= 1
                outermost = not self._under_way
        if outermost and TRANSFORMERS in sys.modules:
            self.finish()

    def finish(self) -> None:
        """Register, once. The hook goes; it stays for another try when Transformers could not be imported whole."""
        with self._lock:
            if self._done:
                return
            self._done = True
        try:
            register()
        except BaseException:
            self._done = False
            raise
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Watched(Loader):
    """A module's own loader, but for what happens when it executes the module."""

    def __init__(self, loader: Loader, hook: _Hook) -> None:
        self._loader, self._hook = loader, hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """As the loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """As the loader does, which the module gets back first; then the hook's part."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._hook.run(self._loader, module)
