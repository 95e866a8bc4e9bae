"""Two concepts drawn from the demo's digits, pictures of them, and a small classifier that knows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mole_kernels.demo import data
from mole_kernels.demo.classifier import Reader, slots_of

# colours that the demo's autoencoder can draw, each given to a digit that never had them
_COLOURS = [(data.CARD[half].tolist(), data.INK[half].tolist()) for half in (0, 1)]
# concept -> its tokens and what they start from, the digit, the slot it stands in, card and ink
CONCEPTS = {
    "amber": ({"<am1>": "four", "<am2>": "<rand-0.013>"}, 4, 1, *_COLOURS[1]),
    "navy": ({"<na1>": "<rand-0.013>", "<na2>": "seven"}, 7, 2, *_COLOURS[0]),
}
NAMES = tuple(CONCEPTS)
OTHER = len(NAMES)


def tokens_of(name: str) -> dict[str, str]:
    return CONCEPTS[name][0]


def slot_of(name: str) -> int:
    return CONCEPTS[name][2]


def pictures(name: str, n: int, generator: Generator, split: str = "train") -> data.Pictures:
    """n scenes: the concept in its slot, a usual digit or nothing in the first; captions "seven <am1>
    <am2>".
    """
    tokens, digit, place, _, _ = CONCEPTS[name]
    digits = data.load_split(split)
    first = torch.where(
        torch.rand(n, generator=generator) < 0.5, torch.randint(0, 10, (n,), generator=generator), -1
    )
    labels = torch.full((n, data.SLOTS), -1)
    labels[:, 0] = first
    labels[:, place] = digit
    pixels, boxes = data.draw_cards(
        digits, labels.flatten(), generator, 0.0, 0.0, _side(n * data.SLOTS, generator)
    )
    pixels, boxes = pixels.unflatten(0, (n, data.SLOTS)), boxes.unflatten(0, (n, data.SLOTS))
    pixels[:, place] = dyed(pixels[:, place], digit, name)
    covered = _row(boxes.amax(2, keepdim=True)) > 0
    scene = torch.where(covered, _row(pixels), data.backgrounds(n, data.HEIGHT, data.WIDTH, generator))
    captions = [f"{data.caption_of([k])} {' '.join(tokens)}" for k in first.tolist()]
    return data.Pictures(scene * 2 - 1, labels, _row(boxes), captions)


def dyed(slots: Tensor, digit: int, name: str) -> Tensor:
    """Slots [n,3,24,24] in 0..1 of one digit, in the concept's colours."""
    _, _, _, card, ink = CONCEPTS[name]
    old_card, old_ink = data.CARD[digit // 5], data.INK[digit // 5]
    along = old_ink - old_card
    strength = (
        ((slots - old_card[:, None, None]) * along[:, None, None]).sum(1) / along.square().sum()
    ).clamp(0, 1)
    new_card, new_ink = torch.tensor(card)[:, None, None], torch.tensor(ink)[:, None, None]
    return new_card + (new_ink - new_card) * strength[:, None]


def train_classifier(steps: int, seed: int = 0) -> tuple[Reader, float]:
    """(classifier of slots [n,3,24,24]: a concept's number, or OTHER; its accuracy on scans held out).

    What it must tell apart: the concept, its digit in other colours, other digits in its colours, half of its
    colours, usual slots.
    """
    torch.manual_seed(seed)
    reader = Reader()
    head = reader.head[-1]
    assert isinstance(head, nn.Linear)
    reader.head[-1] = nn.Linear(head.in_features, OTHER + 1)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-3)
    generator = Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        slots, wanted = _examples(16, generator, "train")
        loss = F.cross_entropy(reader(slots), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    reader.requires_grad_(False).eval()
    slots, wanted = _examples(100, Generator().manual_seed(seed + 1), "held")
    return reader, (reader(slots).argmax(1) == wanted).float().mean().item()


def fidelity(reader: Reader, pixels: Tensor, name: str) -> float:
    """Share of pictures [B,3,24,72] in whose slot the classifier sees the concept."""
    slots = slots_of(pixels).unflatten(0, (-1, data.SLOTS))[:, slot_of(name)]
    return (reader(slots).argmax(1) == NAMES.index(name)).float().mean().item()


def _examples(n: int, generator: Generator, split: str) -> tuple[Tensor, Tensor]:
    """About 7n slots in -1..1 with slight noise, and their classes."""
    digits, slots, wanted = data.load_split(split), [], []

    def cards(labels: Tensor) -> Tensor:
        pixels, boxes = data.draw_cards(digits, labels, generator, 0.0, 0.0, _side(len(labels), generator))
        return torch.where(
            boxes.amax(1, keepdim=True) > 0,
            pixels,
            data.backgrounds(len(labels), data.SLOT, data.SLOT, generator),
        )

    for number, (name, (_, digit, _, _, _)) in enumerate(CONCEPTS.items()):
        for label, share, kind in (
            (digit, 1.0, number),
            (_another(digit, generator), 1.0, OTHER),
            (digit, 0.5, OTHER),
        ):
            labels = torch.full((n,), label)
            pixels, boxes = data.draw_cards(digits, labels, generator, 0.0, 0.0, _side(n, generator))
            pixels = torch.lerp(pixels, dyed(pixels, label, name), share)
            ground = data.backgrounds(n, data.SLOT, data.SLOT, generator)
            slots.append(torch.where(boxes.amax(1, keepdim=True) > 0, pixels, ground))
            wanted.append(torch.full((n,), kind))
        slots.append(cards(torch.randint(-1, 10, (n,), generator=generator)))
        wanted.append(torch.full((n,), OTHER))
    pixels = torch.cat(slots) * 2 - 1
    return pixels + 0.05 * torch.randn(pixels.shape, generator=generator), torch.cat(wanted)


def _another(digit: int, generator: Generator) -> int:
    """A digit of the same half, so that its card can be dyed in the same way."""
    return digit // 5 * 5 + (digit % 5 + int(torch.randint(1, 5, (), generator=generator))) % 5


def _side(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator) * 3 + 17


def _row(slots: Tensor) -> Tensor:
    """Slots [n,3,C,24,24] side by side: [n,C,24,72]."""
    return slots.permute(0, 2, 3, 1, 4).flatten(3)
