"""accelerate's view of the processes, with the other ones also where they have no GPU."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """PartialState, told to look for others on a CPU where that is all there is.

    By itself it does not, and then each process of `accelerate launch` takes itself for the only one, and every one does all the work.
    """
    return PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available())
