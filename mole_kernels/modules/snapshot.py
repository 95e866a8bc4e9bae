"""All or nothing: what a block of code did to modules is taken back when it raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mole_kernels.layers.attach import follow_class


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Class, attributes, hooks, parameters and requires_grad flags of `modules` are put back if the block
    raises anything at all.

    Objects are put back, not values: writes into tensors are the block's own to undo.
    """
    before = Before(modules)
    try:
        yield
    # the block had ended, and Ctrl-C came before it could say so: taken back later, when somebody lets go of
    # this, it would be half undone
    except GeneratorExit:
        raise
    # Ctrl-C and running out of memory must not leave half a patch either
    except BaseException:
        before.restore()
        raise


class Before:
    """`all_or_nothing` by hand, where the caller returns something that must not be lost to a Ctrl-C at the
    end of a `with`.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._snapshots = [_Snapshot(module) for module in modules]

    def restore(self) -> None:
        for snapshot in self._snapshots:
            snapshot.restore()


# parameters, buffers, children, hooks: the dicts that torch itself keeps on every module
_TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


class _Snapshot:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.attributes = dict(module.__dict__)
        self.tables = {name: dict(self.attributes[name]) for name in _TABLES}
        self.flags: list[tuple[Tensor, bool]] = [
            (p, p.requires_grad) for p in module._parameters.values() if p is not None
        ]

    def restore(self) -> None:
        before, self.module.__class__ = type(self.module), self.cls
        if before is not self.cls:
            follow_class(self.module, before)
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for name, table in self.tables.items():
            # the same dict object: others may hold it
            self.attributes[name].clear()
            self.attributes[name].update(table)
        for tensor, flag in self.flags:
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)
