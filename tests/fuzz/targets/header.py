"""The reader of safetensors: header, data, and back through the writer."""

from __future__ import annotations

from mole_kernels.files.header import printable_metadata
from mole_kernels.files.reader import SafetensorsFile
from mole_kernels.files.writer import atomic_save
from tests.fuzz.meeting import file_of, folder, same

JSON = False


def check(data: bytes) -> None:
    path = file_of(data, "header.safetensors")
    with SafetensorsFile(path) as file:
        entries, metadata = file.header.entries, file.header.metadata
        tensors = file.read()
    # every byte belongs to exactly one tensor, and none was made up
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert (
        held
        == sum(e.end - e.begin for e in entries.values())
        == len(data) - 8 - int.from_bytes(data[:8], "little")
    )
    assert all(text.isprintable() for item in printable_metadata(metadata).items() for text in item)
    again = folder() / "again.safetensors"
    atomic_save(tensors, again, metadata)
    with SafetensorsFile(again) as file:
        written = file.read()
        assert file.header.metadata == metadata
    assert list(written) == list(tensors) and all(same(written[key], tensors[key]) for key in tensors)
