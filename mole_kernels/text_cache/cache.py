"""Keys and values of cross-attention, made once per text instead of once per denoising step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypedDict, get_args

from torch import Tensor, nn

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.layers.fingerprint import Check
from mole_kernels.modules.scan import roots
from mole_kernels.ops.direct import PLAIN
from mole_kernels.tally import totals
from mole_kernels.text_cache.layer import LAYERS, CachedForward, has_offload_hook
from mole_kernels.text_cache.texts import Texts

PROJECTIONS = ("to_k", "to_v", "add_k_proj", "add_v_proj")


class CacheReport(TypedDict):
    """What `TextCache.report` returns."""

    layers: int
    reused: int
    computed: int
    aside: dict[str, int]
    skipped: dict[str, str]


def cache_text(model: object, *, check: Check = "sample", texts: int = 4) -> TextCache:
    """Compute k = to_k(text) and v = to_v(text) once for each text, and reuse them bit for bit.

    An output is reused for as long as nothing that it depends on has changed. Nothing is cached before this
    is called; `close`, or the end of `with`, takes the cache off. While gradients are on, inside compiled
    graphs and CUDA graph capture, and under offload hooks, the layers compute as usual; `TextCache.report`
    says how often and why. Every thread has its own texts: no output that one thread holds is given to
    another.

    Args:
        model: An `nn.Module` or a diffusers pipeline, patched or not. The cache goes on the projections of
        its
            cross-attention layers that see the text.
        check: What is compared beside identity and torch's version counters, which writes through `.data` do
        not
            move.
            "sample": on the CPU the whole text, and some 1024 places of each weight; nothing on other
            devices. "content": every element of the text and the weights; on a GPU this waits for the device.
            "versions": nothing.
        texts: Number of texts to keep in each thread. Guidance that calls the model twice per step needs 2.

    Returns:
        The cache, which is also a context manager.

    Raises:
        MoleTypeError: `model` is neither a module nor a pipeline.
        MoleValueError: `check` or `texts` has no meaning.
        MoleStateError: The model has no cross-attention whose keys and values could be kept.

    Example:
        >>> with mk.cache_text(pipe):
        ...     image = pipe("a cat", num_inference_steps=30).images[0]
    """
    if check not in get_args(Check):
        raise MoleValueError(
            "cache_text", expected="check = 'sample', 'content' or 'versions'", got=repr(check)
        )
    if texts < 1:
        raise MoleValueError("cache_text", expected="texts >= 1", got=texts)
    layers: list[tuple[str, nn.Module, nn.Module]] = []
    skipped: dict[str, str] = {}
    for path, owner, layer in cross_projections(model):
        if reason := reason_against_caching(layer):
            skipped[path] = reason
        else:
            layers.append((path, owner, layer))
    if not layers:
        first = f"; {next(iter(skipped))}: {next(iter(skipped.values()))}" if skipped else ""
        raise MoleStateError(
            "cache_text", f"this model has no cross-attention whose keys and values could be kept{first}"
        )
    return TextCache(layers, skipped, check, texts)


def cross_projections(model: object) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, attention, layer) of every projection that sees the text alone.

    Joint attention, where text and picture mix, has none.
    """
    for name, root in roots(model).items():
        for path, owner in root.named_modules(prefix=name):
            if getattr(owner, "is_cross_attention", False) is not True:
                continue
            # this class with added projections lets to_k and to_v see the picture
            added = hasattr(owner, "only_cross_attention") and owner._modules.get("add_k_proj") is not None
            for projection in PROJECTIONS[2 if added else 0 :]:
                layer = owner._modules.get(projection)
                if layer is not None:
                    yield f"{path}.{projection}", owner, layer


def reason_against_caching(layer: nn.Module) -> str | None:
    """Why no cache can be put on this layer, or None."""
    if type(layer) not in LAYERS:
        return (
            f"{type(layer).__name__} may change in ways that leave no trace; "
            "only nn.Linear and our own layers are kept"
        )
    attributes = layer.__dict__
    if any(isinstance(attributes.get(name), CachedForward) for name in ("forward", "_old_forward")):
        return "another cache is on it"
    if has_offload_hook(layer):
        return "offload hooks move its weights"
    if "forward" in attributes:
        return "its forward has been replaced on the instance"
    if any(type(t) not in PLAIN for t in layer.parameters()):
        return "its tensors are sharded, or of another class of their own"
    return None


class TextCache:
    """What `cache_text` returns; as a context manager it closes at the end of the block."""

    def __init__(
        self,
        layers: list[tuple[str, nn.Module, nn.Module]],
        skipped: dict[str, str],
        check: Check,
        texts: int,
    ) -> None:
        self.check, self.limit = check, texts
        self.skipped = skipped
        self.texts = Texts(texts)
        self.counts: Counter[str] = Counter()
        self.aside: Counter[str] = Counter()
        self.layers = {path: CachedForward(self, owner, layer) for path, owner, layer in layers}
        for forward in self.layers.values():
            forward.put_on()

    @property
    def reused(self) -> int:
        """Calls that got a kept output."""
        return totals(self.counts).get("reused", 0)

    @property
    def computed(self) -> int:
        """Calls that computed an output to keep."""
        return totals(self.counts).get("computed", 0)

    def __enter__(self) -> TextCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TextCache({len(self.layers)} layers, {self.reused} reused, {self.computed} computed)"

    def report(self) -> CacheReport:
        """Report how often the cache was used. Calls inside a compiled graph are not counted.

        Returns:
            A dictionary:
                layers: Number of layers that the cache is on.
                reused: Calls that got a kept output.
                computed: Calls that computed an output to keep.
                aside: {reason: calls that the layer computed as usual}.
                skipped: {path: reason why the cache is not on this projection}.
        """
        return {
            "layers": len(self.layers),
            "reused": self.reused,
            "computed": self.computed,
            "aside": totals(self.aside),
            "skipped": dict(self.skipped),
        }

    def clear(self) -> None:
        """Forget every key and value, in all threads; the next call computes them."""
        for forward in self.layers.values():
            forward.forget()
        self.texts = Texts(self.limit)

    def close(self) -> None:
        """Take the cache off its layers. The second time does nothing."""
        for forward in self.layers.values():
            forward.take_off()
        self.clear()

    def compares_whole(self, x: Tensor) -> bool:
        """Whether every element of a text is compared, even if nothing seems to have been written to it."""
        return self.check == "content" or (self.check == "sample" and x.is_cpu)
