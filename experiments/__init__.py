"""Scripts that measure. `python -m experiments.NAME` runs one, whichever folder it is in.

The folders are for people; commands in documents and in results name scripts without them. So a
finder at the end of sys.meta_path answers for experiments.NAME with the file that the registry
gives. Imported by that name, a script is the one module at its real place, not a second copy.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

from experiments.registry import named


class _ShortName(SourceFileLoader):
    """Loads a script by its short name: as code for `python -m`, else as the real module."""

    def __init__(self, fullname: str, path: str, module: str) -> None:
        super().__init__(fullname, path)
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._module)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # it was just set to the short name's


class _ShortNames(MetaPathFinder):
    """Finds experiments.NAME where the registry says it is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        script = named(name) if package == __name__ else None
        if script is None or script.module == fullname:
            return None
        file = str(script.path)
        loader = _ShortName(fullname, file, script.module)
        return spec_from_file_location(fullname, file, loader=loader)


if not any(isinstance(finder, _ShortNames) for finder in sys.meta_path):
    sys.meta_path.append(_ShortNames())
