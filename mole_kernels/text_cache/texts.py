"""The texts that one thread has seen, and what was computed from each."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mole_kernels.layers.fingerprint import bits_of, layout_of, version_of

if TYPE_CHECKING:
    from mole_kernels.text_cache.layer import CachedForward, CachedOutput


class KnownText:
    """A text that was seen: the tensor, how it stood, a copy of its bits, and the outputs that were made of
    it.

    The tensor is held, so that no other one comes to lie where it lies.
    """

    def __init__(self, x: Tensor) -> None:
        self.seen = _standing(x)
        self.layout = layout_of(x)
        self.outputs: dict[CachedForward, CachedOutput] = {}
        with torch.inference_mode(False), torch.no_grad():
            self.bits = bits_of(x).clone()

    def is_text(self, x: Tensor, whole: bool) -> bool:
        """Whether x is this text.

        Args:
            x: The input of a layer.
            whole: Compare every element, even if object, address and version say that nothing was written.
        """
        tensor, *standing = self.seen
        now = _standing(x)
        same = tensor is x and standing == now[1:] and version_of(x) is not None
        if same and not whole:
            return True
        if self.layout != layout_of(x) or not torch.equal(bits_of(x), self.bits):
            return False
        self.seen = now
        return True


def _standing(x: Tensor) -> list[object]:
    return [x, x.data_ptr(), version_of(x), layout_of(x)]


class Texts(threading.local):
    """The last few texts of each thread, the newest first.

    Threads share nothing: a layer's output that one thread holds, or writes into, is never given to another.
    The texts of a thread that ends are forgotten.
    """

    def __init__(self, limit: int) -> None:
        # runs once in each thread
        self.limit = limit
        self.known: list[KnownText] = []

    def find(self, x: Tensor, whole: bool) -> KnownText:
        """The text that x is, known or new."""
        for text in self.known:
            if text.is_text(x, whole):
                return text
        text = KnownText(x)
        # the oldest goes, and with it every output that was made of it
        self.known = [text, *self.known[: self.limit - 1]]
        return text
