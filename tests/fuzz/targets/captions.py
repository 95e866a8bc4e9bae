"""A metadata.jsonl of captions: lines that are wrong are told, names that climb out are none."""

from __future__ import annotations

from mole_kernels.training.captions import METADATA, read_captions
from tests.fuzz.meeting import folder

JSON = True


def check(data: bytes) -> None:
    root = folder() / "pictures"
    if not root.exists():
        (root / "sub").mkdir(parents=True)
        (root / "a.png").write_bytes(b"")
        (root / "sub" / "b.png").write_bytes(b"")
    (root / "sub" / METADATA).write_bytes(data)
    captions, bad = read_captions(root)
    assert set(captions) <= {"a.png", "sub/b.png", f"sub/{METADATA}"}
    assert all(line.isprintable() for line in bad.values()) and all(
        isinstance(caption, str) for caption in captions.values()
    )
