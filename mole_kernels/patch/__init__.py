"""From plan to patched model and back. `mole_kernels.patch` names this room and its main function, so the room can be called."""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from mole_kernels.patch.apply import patch

        return patch(*args, **kwargs)


# python binds the name to the room as soon as anything in it is imported, whatever the package had bound it to
sys.modules[__name__].__class__ = _Room
