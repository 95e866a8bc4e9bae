"""diffusers' group offloading lists a model's tensors when it is switched on: after a patch it must list them
anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from mole_kernels.errors import MoleStateError

_HOOK = "group_offloading"


def in_groups(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of `roots` under group offloading. Raises MoleStateError where it is to the disk, in files
    written once.
    """
    offloaded_groups = []
    for root in roots:
        groups = [hook.group for module in root.modules() if (hook := _hook_of(module)) is not None]
        if any(getattr(group, "offload_to_disk_path", None) for group in groups):
            raise MoleStateError(
                "patch",
                "group offloading has written the model's tensors to the disk, where experts have no place",
                hint="patch first, then enable_group_offload; or offload to memory",
            )
        if groups:
            offloaded_groups.append(root)
    return offloaded_groups


def regroup(roots: Iterable[nn.Module]) -> None:
    """Take the groups off and put them on again as they were asked for, as diffusers does after loading a
    LoRA.
    """
    for root in roots:
        sys.modules["diffusers.hooks.group_offloading"]._maybe_remove_and_reapply_group_offloading(root)


def _hook_of(module: nn.Module) -> Any:
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(_HOOK)
