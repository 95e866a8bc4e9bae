"""How often PEFT layers went through our operator, how often they did not, and why."""

from __future__ import annotations

from collections import Counter

from mole_kernels.backends import select

# module-wide on purpose: a user asks one question about the process; threads may lose a count, never more
accelerated: Counter[str] = Counter()
fallbacks: Counter[str] = Counter()
CALLED = "base called: "


def status(*, reset: bool = False, device: str = "cpu") -> dict[str, object]:
    """Counts since the start or the last reset; calls inside a compiled graph are not counted.

    accelerated  calls of accelerated PEFT layers that we computed
    base_called  {reason: those among them whose base layer was called as it is, our low-rank part added to
                 what it said}
    fallbacks    {reason: calls that PEFT's own forward computed}
    backends     {name: None where it takes a small float32 problem on `device`, else why not}
    refusals     {"backend: reason": times that "auto" passed the backend over}
    reset        the counts begin again at zero after this report
    """
    report: dict[str, object] = {
        "accelerated": accelerated.total(),
        "base_called": {
            key.removeprefix(CALLED): n for key, n in accelerated.most_common() if key.startswith(CALLED)
        },
        "fallbacks": dict(fallbacks.most_common()),
        "backends": select.report(device),
        "refusals": {
            f"{backend}: {reason}": count for (backend, reason), count in select.refusals.most_common()
        },
    }
    if reset:
        accelerated.clear()
        fallbacks.clear()
        select.refusals.clear()
    return report
