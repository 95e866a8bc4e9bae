"""Which prompt each sample belongs to: read from the pipeline that runs, told by the caller, or refused.

A batch of B samples consists of parts (the halves of classifier-free guidance, perturbed copies), each of
them the L latents of the call; the latents are the P prompts, each repeated for its pictures. B alone cannot
tell two parts from two pictures per prompt, so L and the pictures are read from the pipeline's `__call__`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError

# a batch as models take it: one tensor [B,…], or a list of B tensors
Batch: TypeAlias = Tensor | Sequence[Tensor]
# what pipelines call their latents [L,…]
LATENTS = ("latents", "intermediate_images")
# parts of what they call the embeddings of their prompts
TEXTS = ("prompt_embeds", "text_hidden_states")


@dataclass(frozen=True)
class PipelineCall:
    """What the `__call__` of the running pipeline has settled.

    Args:
        name: Class of the pipeline.
        prompts: Number of prompts, where it is known.
        pictures: Outputs per prompt.
        latents: [L,…], one row for each output; None before they are made.
        texts: Each [k·L,…] or k·L tensors: the prompts' embeddings, as far as their names are known.
    """

    name: str
    prompts: int | None
    pictures: int
    latents: Tensor | None
    texts: tuple[Batch, ...]


def running_call(module: nn.Module) -> PipelineCall | None:
    """The call of the pipeline that runs `module` at this moment; None where no pipeline does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            names = frame.f_locals
            if _has_component(names.get("self"), module):
                return _read_call(names)
        frame = frame.f_back
    return None


def _has_component(owner: object, module: nn.Module) -> bool:
    # `components` of a diffusers pipeline inspects its signature at every look; the attributes are the same
    parts = getattr(owner, "__dict__", {})
    return hasattr(type(owner), "components") and any(
        part is module or getattr(part, "_orig_mod", None) is module for part in parts.values()
    )


def _read_call(names: Mapping[str, Any]) -> PipelineCall:
    prompt = names.get("prompt")
    counts = {
        value
        for name, value in names.items()
        if name.startswith("num_") and name.endswith("_per_prompt") and isinstance(value, int) and value > 1
    }
    latents = next((t for name in LATENTS if isinstance(t := names.get(name), Tensor) and t.dim() > 1), None)
    texts = (value for name, value in names.items() if any(known in name for known in TEXTS))
    return PipelineCall(
        type(names["self"]).__name__,
        1 if isinstance(prompt, str) else len(prompt) if isinstance(prompt, list | tuple) else None,
        # two such numbers that differ (pictures and videos) say nothing: 0 fits no batch
        (counts.pop() if len(counts) == 1 else 0) if counts else 1,
        latents,
        tuple(t for t in texts if isinstance(t, list) or (isinstance(t, Tensor) and t.dim() > 1)),
    )


@dataclass(frozen=True)
class SampleOrder:
    """How the samples of a batch follow one another: `parts` times the prompts, each `pictures` times.

    Args:
        parts: Number of whole batches one behind the other.
        pictures: Samples of one prompt in a part.
        prompts: Number of prompts.
        by_prompt: Whether a prompt's pictures lie side by side; if not, the prompts are repeated as a whole.
    """

    parts: int
    pictures: int
    prompts: int
    by_prompt: bool = True

    def rows(self) -> list[int]:
        """The prompt of each sample [parts · prompts · pictures]."""
        if self.by_prompt:
            return [p for p in range(self.prompts) for _ in range(self.pictures)] * self.parts
        return list(range(self.prompts)) * (self.pictures * self.parts)


def sample_order(
    where: str, prompts: int, batch: Batch, call: PipelineCall | None, parts: int | None
) -> SampleOrder:
    """The order of a batch whose prompts take different adapters.

    Args:
        where: The component, for messages.
        prompts: P, the number of prompts that were assigned.
        batch: The samples, B of them.
        call: The pipeline's call, where one runs.
        parts: How often the batch lies behind itself, where the caller has said so.

    Raises:
        MoleShapeError: The batch does not fit the prompts, or more than one order does.
    """
    B = len(batch)
    reason = "no pipeline runs that would tell how its batch was made"
    if call is not None:
        order = _order_in(call, prompts, batch)
        if isinstance(order, SampleOrder):
            return order
        reason = order
    if parts is not None and B % (prompts * parts) == 0:
        return SampleOrder(parts, B // (prompts * parts), prompts)
    if prompts == B and (call is None or call.latents is None):
        return SampleOrder(1, 1, prompts)
    raise MoleShapeError(
        where,
        f"cannot tell which of the {prompts} prompts assigned each of the {B} samples belongs to: {reason}",
        expected=f"a batch that is a multiple of the {prompts} prompts"
        + (f" times {parts} parts" if parts else ""),
        got=B,
        hint="assign one adapter, or None, to every prompt of the call; parts=… says how often the batch is "
        "laid behind itself (guidance: 2)",
    )


def _order_in(call: PipelineCall, prompts: int, batch: Batch) -> SampleOrder | str:
    """The order, or why it cannot be told."""
    if call.latents is None:
        return f"{call.name} has no latents yet"
    B, L = len(batch), len(call.latents)
    if prompts * call.pictures == L and call.prompts in (None, prompts):
        pictures = call.pictures
    elif prompts == L and (call.prompts is None or call.prompts * call.pictures == L):
        # one name for each picture
        pictures = 1
    else:
        return f"{call.name} draws {L} outputs, {call.pictures or '?'} per prompt"
    if B % L:
        return f"{call.name} has {L} latents"
    parts = B // L
    if parts > 1 and not _repeats(batch, parts, call.latents):
        return f"the {parts} parts of {L} samples do not hold the same latents"
    if pictures == 1:
        return SampleOrder(parts, pictures, prompts)
    orders = _orders_of_texts(call.texts, L, pictures)
    if not orders:
        return f"{call.name} shows no embeddings of its prompts that follow one order of the pictures"
    # prompts of equal texts show either order: then side by side, as diffusers repeats them
    return SampleOrder(parts, pictures, prompts, by_prompt=True in orders)


def _orders_of_texts(texts: Sequence[Batch], L: int, pictures: int) -> set[bool]:
    """The values of `by_prompt` that all embeddings agree on which follow an order at all."""
    agreed, seen = {True, False}, False
    for batch in texts:
        if not len(batch) or len(batch) % L or not all(isinstance(t, Tensor) for t in batch):
            continue
        orders = {o for o in (True, False) if _is_constant(batch, L, pictures, by_prompt=o)}
        # the first dimension of some embeddings is not the sample: they follow neither
        if orders:
            agreed, seen = agreed & orders, True
    return agreed if seen else set()


def _repeats(batch: Batch, parts: int, latents: Tensor) -> bool:
    """Whether every part begins with the same channels; conditions of a part may lie behind them."""
    L = len(batch) // parts
    if not isinstance(batch, Tensor):
        return all(torch.equal(batch[i], batch[i % L]) for i in range(L, len(batch)))
    if batch.dim() > 1 and batch.dim() == latents.dim():
        batch = batch[:, : latents.shape[1]]
    split = batch.reshape(parts, L, *batch.shape[1:])
    return torch.equal(split, split[:1].expand_as(split))


def _is_constant(texts: Batch, L: int, pictures: int, *, by_prompt: bool) -> bool:
    """Whether each prompt's embedding is the same for all its pictures, in every part of L rows."""
    shape = (-1, L // pictures, pictures) if by_prompt else (-1, pictures, L // pictures)
    # every prompt's first picture takes the place of the others
    index = torch.arange(len(texts)).reshape(shape)
    first = (index[:, :, :1] if by_prompt else index[:, :1]).expand_as(index).flatten().tolist()
    return all(torch.equal(texts[i], texts[j]) for i, j in enumerate(first) if i != j)
