"""One vocabulary of faults for every backend: what is planted, and where. The table is
docs/kernels/mutants.md.
"""

from __future__ import annotations

from dataclasses import dataclass

# the first ten are those that every suite for this operator must kill; the others are what such kernels get
# wrong in practice
FAULTS = {
    "scale": "a scale 5 % off",
    "swapped": "two experts swapped",
    "tail": "K's tail is lost",
    "row": "one row has another row's gate",
    "zero": "one element is zero",
    "stale": "a sample gate kept from an earlier call, or read too early",
    "stride": "one set of experts for all samples",
    "bias": "the bias is dropped",
    "fp8": "gates rounded to eight bits",
    "transposed": "up read as if it were transposed",
    "neighbour": "the next sample's gate, or the first's for all",
    "mask": "a mask or an edge off by one",
    "mixed": "one expert's down with another's up",
    "sixteen": "sums kept in sixteen bits",
    "mean": "a sum for a mean",
    "forgotten": "a gate left out",
    "top_k": "another k, or no softmax",
    "assigned": "an assignment ignored",
    "nan": "a NaN turned into a number",
    "saved": "the backward reads another sample's h",
    "logit": "a gate's derivative is not the gate's",
    "pooled": "the pooled gate's part of dh forgotten",
    "parts": "a part of a sum forgotten, or counted too early",
    "flag": "a flag or a counter not waited for, or weaker than it must be",
    "barrier": "a barrier, a fence or a stage of a pipeline lost",
}
BACKENDS = ("reference", "stacked", "cpu", "triton", "cuda")
NO_FLAGS = "one thread of control: nothing waits for a flag"
NO_BARRIER = "no threads that meet in the middle of a call"
# (fault, backend): why there is nothing to plant
ABSENT = {
    ("flag", "reference"): NO_FLAGS,
    ("flag", "stacked"): NO_FLAGS,
    ("flag", "cpu"): "threads join at the end of each product: nothing waits for a flag",
    ("barrier", "reference"): NO_BARRIER,
    ("barrier", "stacked"): NO_BARRIER,
    ("barrier", "cpu"): "threads join at the end of each product, torch's own barrier",
    ("parts", "reference"): "its sums are torch's",
    ("parts", "stacked"): "its sums are torch's",
    ("pooled", "cuda"): "calls with a sample gate have Triton's backward",
    ("nan", "cuda"): "no NaN goes through the emulator's programs; `make gpu` sends one through the kernels",
}


@dataclass(frozen=True)
class Planted:
    """In `file`, `old` becomes `new`; `backward`: only gradients can show it."""

    fault: str
    file: str
    old: str
    new: str
    backward: bool = False

    def __str__(self) -> str:
        return self.fault
