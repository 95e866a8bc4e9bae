"""A folder of pictures: what is read, in which order and size, and what is said of the rest."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleValueError, MoleWarning
from mole_kernels.training.buckets import cover, make_buckets, nearest
from mole_kernels.training.pictures import PictureFolder


def picture(path: Path, size=(32, 32), colour=(255, 0, 0), mode="RGB", caption=None, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size[1], size[0]), colour).save(path, **save)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def metadata(root: Path, *lines: object):
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )


def folder(root, resolution=32, multiple=8, **options):
    return PictureFolder(root, resolution, multiple=multiple, **options)


def test_captions_from_metadata_and_from_texts_in_the_order_of_names(tmp_path):
    for name, caption in (
        ("c.png", None),
        ("b.jpg", "from the text"),
        ("sub/a.webp", None),
        ("a.png", "text loses"),
    ):
        picture(tmp_path / name, caption=caption)
    metadata(
        tmp_path,
        {"file_name": "c.png", "text": " a sea "},
        "",
        {"file_name": "a.png", "text": "metadata wins", "more": 3},
    )
    metadata(tmp_path / "sub", {"file_name": "a.webp", "text": "below"})
    found = folder(tmp_path)
    captions = [
        ("a.png", "metadata wins"),
        ("b.jpg", "from the text"),
        ("c.png", "a sea"),
        ("sub/a.webp", "below"),
    ]
    assert [(p.name, p.caption) for p in found] == captions
    assert found.skipped == {} and len(found) == 4 and len({p.digest for p in found}) == 3
    metadata(tmp_path / "sub", {"file_name": "a.webp", "caption": "another column"})
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "c.png").unlink()
    assert folder(tmp_path, column="caption")[2].caption == "another column"


def test_the_order_is_not_the_file_systems(tmp_path, monkeypatch):
    for name in "cab":
        picture(tmp_path / f"{name}.png", caption=name)
    glob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(glob(self, pattern), reverse=True))
    assert [p.caption for p in folder(tmp_path)] == ["a", "b", "c"]


def test_buckets_hold_the_area_and_every_side_is_a_multiple():
    found = make_buckets(512)
    assert (512, 512) in found and (384, 640) in found and (704, 320) not in found
    assert all(h % 64 == w % 64 == 0 and h * w <= 512 * 512 and max(h, w) <= 2 * min(h, w) for h, w in found)
    assert {(w, h) for h, w in found} == set(found)
    # nothing was lost to rounding down: one more row would pass the area
    assert all((h + 64) * w > 512 * 512 or (w + 64) * h > 512 * 512 for h, w in found)
    assert nearest((300, 300), found) == (512, 512)
    assert nearest((1000, 1900), found) == (384, 640) and nearest((100, 5000), found) == nearest(
        (1, 2), found
    )
    with pytest.raises(MoleValueError, match="multiple of 64"):
        make_buckets(500)


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (1, 7), (2000, 100)])
def test_a_cover_covers_and_cuts_the_centre(size):
    for bucket in make_buckets(32, 8):
        (h, w), (top, left) = cover(size, bucket)
        assert h >= bucket[0] and w >= bucket[1] and (h == bucket[0] or w == bucket[1])
        assert abs((h - bucket[0]) - 2 * top) <= 1 and abs((w - bucket[1]) - 2 * left) <= 1


def test_pixels_are_cut_from_the_middle_of_a_scaled_picture(tmp_path):
    # three vertical bands; the outer ones fall to the cut
    image = Image.new("RGB", (48, 16), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))
    image.save(tmp_path / "bands.png")
    (tmp_path / "bands.txt").write_text("bands")
    square = folder(tmp_path, 16, buckets=False)
    pixels = square.pixels(0)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert torch.equal(pixels[:, :, 4:12], torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 16, 8))
    assert square.time_ids(0).tolist() == [16, 48, 0, 16, 16, 16]
    wide = folder(tmp_path, (16, 48))
    assert (
        wide.pixels(0).shape == (3, 16, 48)
        and wide.pixels(0)[0].amin() == -1
        and wide.pixels(0)[0].amax() == 1
    )
    assert folder(tmp_path, buckets=[(32, 16), (16, 32)]).counts() == {(16, 32): 1}


@pytest.mark.parametrize(
    "mode, colour, wanted",
    [("L", 255, 1.0), ("RGBA", (0, 0, 0, 0), 1.0), ("P", 0, None), ("CMYK", (0, 0, 0, 0), 1.0)],
)
def test_other_modes_become_rgb_and_transparent_becomes_white(tmp_path, mode, colour, wanted):
    picture(tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}", mode=mode, colour=colour, caption="x")
    pixels = folder(tmp_path).pixels(0)
    assert pixels.shape == (3, 32, 32)
    if wanted is not None:
        assert (pixels - wanted).abs().max() < 0.02


def test_a_rotated_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "x.jpg", size=(32, 64), caption="x", exif=exif)
    found = folder(tmp_path)
    assert found[0].size == (64, 32) and found[0].bucket[0] > found[0].bucket[1]


@dataclass(frozen=True)
class Bad:
    name: str
    what: str

    def __str__(self):
        return self.name

    def make(self, root: Path):
        getattr(self, f"_{self.name}")(root)

    def _broken(self, root):
        picture(root / "x.png", caption="x")
        (root / "x.png").write_bytes((root / "x.png").read_bytes()[:50])

    def _text_named_png(self, root):
        (root / "x.png").write_text("no picture")
        (root / "x.txt").write_text("x")

    def _no_caption(self, root):
        picture(root / "x.png")

    def _empty_caption(self, root):
        picture(root / "x.png", caption=" \n")

    def _caption_not_text(self, root):
        picture(root / "x.png")
        (root / "x.txt").write_bytes(b"\xff\xfe\x80")

    def _bomb(self, root):
        picture(root / "x.png", size=(10_000, 10_000), mode="1", colour=0, caption="x")

    def _line_not_json(self, root):
        metadata(root, "{not json")

    def _line_without_name(self, root):
        metadata(root, {"text": "x"})

    def _line_without_text(self, root):
        metadata(root, {"file_name": "good.png"})

    def _line_names_nothing(self, root):
        metadata(root, {"file_name": "gone.png", "text": "x"})

    def _line_climbs_out(self, root):
        picture(root.parent / "out.png")
        metadata(root, {"file_name": "../out.png", "text": "x"})

    def _two_captions(self, root):
        metadata(root, {"file_name": "good.png", "text": "x"}, {"file_name": "good.png", "text": "y"})


BAD = [
    Bad("broken", r"x\.png is no picture that can be read"),
    Bad("text_named_png", r"x\.png is no picture that can be read"),
    Bad("no_caption", r"x\.png has no caption"),
    Bad("empty_caption", r"x\.png has an empty caption"),
    Bad("caption_not_text", r"x\.png its \.txt cannot be read as text"),
    Bad("bomb", r"x\.png is no picture that can be read \(DecompressionBombError"),
    Bad("line_not_json", r"metadata\.jsonl line 1 is not JSON"),
    Bad("line_without_name", r'metadata\.jsonl line 1 has no "file_name"'),
    Bad("line_without_text", r'metadata\.jsonl line 1 has no "text" for good\.png'),
    Bad("line_names_nothing", r"metadata\.jsonl line 1 names a file that is not there: gone\.png"),
    Bad("line_climbs_out", r"metadata\.jsonl line 1 names a file outside the folder: \.\./out\.png"),
    Bad("two_captions", r"metadata\.jsonl line 2 a second caption for good\.png"),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_entries_are_named_and_refused_or_left_out(tmp_path, bad):
    root = tmp_path / "set"
    picture(root / "good.png", caption="good")
    bad.make(root)
    with pytest.raises(
        MoleFileError, match=f"1 of its entries cannot be trained on: {bad.what}(.|\n)*on_bad='skip'"
    ):
        folder(root)
    with pytest.warns(MoleWarning, match=f"1 entries left out: {bad.what}"):
        found = folder(root, on_bad="skip")
    assert [p.name for p in found] == ["good.png"] and len(found.skipped) == 1


def test_folders_without_pictures(tmp_path):
    with pytest.raises(MoleFileError, match="expected a folder of pictures, got no folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(MoleFileError, match="holds no picture with a caption"):
        folder(tmp_path)
    picture(tmp_path / "x.png")
    with (
        pytest.warns(MoleWarning, match="has no caption"),
        pytest.raises(MoleFileError, match="holds no picture"),
    ):
        folder(tmp_path, on_bad="skip")


def test_a_picture_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "x.png", caption="x")
    read = Path.read_bytes

    def refuse(self):
        if self.suffix == ".png":
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(MoleFileError, match=r"x\.png cannot be read \(Permission denied\)"):
        folder(tmp_path)


def test_one_caption_for_all_is_remarked(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png", caption="a digit")
    with pytest.warns(MoleWarning, match="all 2 pictures have one and the same caption"):
        folder(tmp_path)


def test_hostile_names_are_printed_harmlessly(tmp_path):
    picture(tmp_path / "x\x1b[31m.png")
    with pytest.raises(MoleFileError) as error:
        folder(tmp_path)
    assert "\x1b" not in str(error.value)


def test_settings_that_make_no_sense(tmp_path):
    for options, message in (
        ({"on_bad": "ignore"}, "'refuse' or 'skip'"),
        ({"resolution": 30}, "multiple of 8"),
        ({"resolution": (30, 32)}, "multiples of 8"),
        ({"buckets": [(8, 9)]}, "multiples of 8"),
        ({"buckets": []}, "multiples of 8"),
    ):
        with pytest.raises(MoleValueError, match=message):
            folder(tmp_path, **options)


def test_links_are_followed(tmp_path):
    picture(tmp_path / "blobs" / "1.png")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "blobs" / "1.png", tmp_path / "set" / "a.png")
    metadata(tmp_path / "set", {"file_name": "a.png", "text": "a"})
    assert folder(tmp_path / "set")[0].name == "a.png"
