"""`--scale`: how strong adapters are, as one number or by component."""

from __future__ import annotations

import json

from mole_kernels.errors import MoleValueError, printable
from mole_kernels.patching.block_scales import Scale

FORM = 'a number, or COMPONENT=NUMBER joined by commas, or JSON as in {"unet": {"down": 0.5}}'


def scale_of_text(text: str | None) -> Scale | None:
    """The scale that `Handle.set_scales` takes.

    Args:
        text: "0.8", "unet=1.0,text_encoder=0.5", or JSON with blocks inside components; None: no scale is
            set.

    Raises:
        MoleValueError: The text is none of these.
    """
    if text is None:
        return None
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        if "=" not in text:
            return float(text)
        scale: dict[str, float] = {}
        for entry in text.split(","):
            component, _, number = entry.partition("=")
            if component.strip() in scale or not component.strip():
                raise ValueError
            scale[component.strip()] = float(number)
        return scale
    except ValueError:
        raise MoleValueError("--scale", expected=FORM, got=f"'{printable(text, 60)}'") from None
