"""accelerate's view of the processes, with the other ones also where they have no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env


def processes() -> PartialState:
    """PartialState, told to look for others on a CPU where that is all there is.

    By itself it does not, and then each process of `accelerate launch` takes itself for the only one, and
    every one does all the work.
    """
    return PartialState(
        cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available()
    )


@contextmanager
def as_only_process() -> Iterator[None]:
    """Inside, this process is the only one for accelerate: for runs that each process makes by itself, at its
    own pace.

    Nothing inside may wait for the others; afterwards they are there again.
    """
    shared, prepared = processes().__dict__, AcceleratorState._shared_state
    before, prepared_before = dict(shared), dict(prepared)
    prepared.clear()
    shared.update(
        distributed_type=DistributedType.NO,
        backend=None,
        num_processes=1,
        process_index=0,
        local_process_index=0,
    )
    try:
        yield
    finally:
        prepared.clear()
        prepared.update(prepared_before)
        shared.update(before)
