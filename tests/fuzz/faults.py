"""One fault at a chosen moment of a call: memory that is full, a disk that is full, Ctrl-C."""

from __future__ import annotations

import builtins
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest.mock import patch as replaced

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mole_kernels

PACKAGE = os.path.dirname(mole_kernels.__file__) + os.sep
# rooms whose lines Ctrl-C comes between
ROOMS = tuple(
    PACKAGE + room
    for room in (
        "modules",
        "peft",
        "grouping",
        "text_cache",
        "patching",
        "layers",
        "experts",
        "files",
        "io",
        "gates",
    )
)
# where waiting threads are counted: a `finally` of its own cannot be made safe from Ctrl-C in Python
NEVER = PACKAGE + os.path.join("modules", "forward_lock.py")


class Injected(Exception):
    """Marks a fault as ours."""


class FullMemory(Injected, torch.OutOfMemoryError):
    pass


class FullHost(Injected, MemoryError):
    pass


class CtrlC(Injected, KeyboardInterrupt):
    pass


@dataclass
class Fault:
    """kind: "memory", "host" (at tensor operation number `at`), "disk" (at system call number `at`), "ctrl-c"
    (at line number `at`),
    "kill" (kill -9 of this very process, at system call number `at`).

    count     how many such moments passed      happened  whether the fault was raised
    """

    kind: str
    at: int
    count: int = 0
    happened: bool = field(default=False)

    def __enter__(self) -> Fault:
        self._stack = ExitStack()
        kinds = {
            "memory": self._tensors,
            "host": self._tensors,
            "disk": self._disk,
            "kill": self._disk,
            "ctrl-c": self._lines,
        }
        self._stack.enter_context(kinds[self.kind]())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def moment(self, fault: BaseException) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            self.happened = True
            raise fault

    def _tensors(self) -> AbstractContextManager[Any]:
        fault = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                fault.moment(FullMemory("full") if fault.kind == "memory" else FullHost("full"))
                return func(*args, **(kwargs or {}))

        return Mode()

    def _disk(self) -> AbstractContextManager[Any]:
        stack = ExitStack()

        def full(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.moment(OSError(errno.ENOSPC, "No space left on device"))
                return real(*args, **kwargs)

            return call

        # reading is no moment for a full disk, and taking away what is old neither
        names = ("replace", "rename", "fsync", "open", "chmod", "mkdir")
        for name in (*names, "unlink", "rmdir") if self.kind == "kill" else names:
            stack.enter_context(replaced.object(os, name, full(getattr(os, name))))

        class File:
            """A file whose writes may find the disk full."""

            def __init__(self, file: Any) -> None:
                self._file = file

            def write(self, content: Any) -> int:
                fault.moment(OSError(errno.ENOSPC, "No space left on device"))
                return self._file.write(content)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def __enter__(self) -> Any:
                self._file.__enter__()
                return self

            def __exit__(self, *exc: Any) -> Any:
                return self._file.__exit__(*exc)

        fault, real = self, builtins.open

        def opened(*args: Any, **kwargs: Any) -> Any:
            file = full(real)(*args, **kwargs)
            return File(file) if "b" in str(args[1:2]) and "r" not in str(args[1:2]) else file

        stack.enter_context(replaced.object(builtins, "open", opened))
        return stack

    def _lines(self) -> AbstractContextManager[Any]:
        before = sys.gettrace()

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            if event == "line":
                self.moment(CtrlC())
            return local

        def called(frame: FrameType, event: str, arg: Any) -> Any:
            name = frame.f_code.co_filename
            return local if name.startswith(ROOMS) and name != NEVER else None

        stack = ExitStack()
        stack.callback(sys.settrace, before)
        sys.settrace(called)
        return stack
