"""Processes in groups of their own, so that what they started (a compiler, a program under the sanitizer)
ends with them.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any


def start(command: list[str], **named: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, start_new_session=True, **named)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it and its group, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def limited(command: list[str], seconds: float, **named: Any) -> tuple[int | None, str]:
    """Exit code (None: not done in time, and stopped) and all that it said."""
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **named)
    try:
        said, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        stop(process)
        return None, ""
    return process.returncode, said.decode(errors="replace")
