"""Methods and backends that fail in every way: what `--peers` is given in tests."""

import os
import time

import torch
from torch import nn

from mole_kernels.backends import stacked


class Faulty(nn.Module):
    def __init__(self, layer, how):
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x):
        if self.how == "hangs":
            time.sleep(600)
        if self.how == "dies":
            os._exit(13)
        if self.how == "raises":
            raise RuntimeError("planted")
        y = self.layer.base(x)
        return torch.empty_like(y) * float("nan") if self.how == "NaN" else y


HOWS = ("wrong", "NaN", "raises", "hangs", "dies")
METHODS = {how: (lambda layer, how=how: Faulty(layer, how)) for how in HOWS}


class Backend:
    """The low-rank part 5 % off."""

    name = "five-percent"

    def reason_against(self, problem):
        return None

    def forward(self, call):
        experts = call.experts._replace(scale=call.experts.scale * 1.05)
        return stacked.forward(call._replace(experts=experts))

    def backward(self, *args):
        return stacked.backward(*args)


BACKENDS = {"five-percent": Backend()}
