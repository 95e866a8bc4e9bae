"""DiffLoRA's data: faces drawn by a pipeline, pictures of another face left out, DreamBooth's token and prior."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.io import load_expert
from mole_kernels.methods.difflora.dataset import MinimumSize, train_identities
from mole_kernels.methods.difflora.identities import (
    IdentityPictures,
    PriorBatches,
    SameFace,
    draw_class,
    draw_identities,
)
from mole_kernels.training.cached import picture_batches
from mole_kernels.training.loss import denoising_loss
from mole_kernels.training.pictures import PictureFolder

sys.path.insert(0, str(Path(__file__).parent))
from difflora_data import TRAINING, write_people
from selma_pipeline import tiny_pipeline


class Drawer:
    """Draws the reference's colour with noise of the seed; counts."""

    def __init__(self, stop_at=999):
        self.calls, self.stop_at = [], stop_at

    def __call__(self, prompt, generator=None, ip_adapter_image=None, num_inference_steps=1):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((prompt, num_inference_steps))
        shade = int(torch.randint(0, 40, (1,), generator=generator))
        red, green, blue = (0, 0, 0) if ip_adapter_image is None else ip_adapter_image[0].getpixel((0, 0))
        return SimpleNamespace(images=[Image.new("RGB", (16, 16), (red, green, min(255, blue + shade)))])


class PhotoMaker(Drawer):
    def __call__(self, prompt, input_id_images=None, generator=None):
        return super().__call__(prompt, generator, input_id_images)


SETTINGS = IdentityPictures(("a", "b"), each=2, seed=5)


@pytest.mark.parametrize("kind", [Drawer, PhotoMaker])
def test_a_face_is_drawn_in_many_settings_and_goes_on_where_it_stopped(kind, tmp_path):
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    red.save(tmp_path / "red.png")
    references = {"anna": [red], "ben": [tmp_path / "red.png"]}
    stopped = kind(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        draw_identities(stopped, references, tmp_path / "out", SETTINGS)
    seen: list = []
    drawer = kind()
    folders = draw_identities(drawer, references, tmp_path / "out", SETTINGS, lambda *said: seen.append(said))
    assert len(drawer.calls) == 8 - 3 and seen[-1] == ("ben", 4)
    lines = [json.loads(line) for line in (folders["ben"] / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a", "a", "b", "b"]
    whole = draw_identities(kind(), references, tmp_path / "again", SETTINGS)
    for name in references:
        for i in range(4):
            files = [folder[name] / f"{i:05d}.png" for folder in (folders, whole)]
            assert files[0].read_bytes() == files[1].read_bytes()
    # pictures of one identity differ, and so do those of two from one reference
    colours = {Image.open(f / f"{i:05d}.png").getpixel((0, 0)) for f in folders.values() for i in range(4)}
    assert len(colours) > 4


def test_what_cannot_draw_faces_is_named(tmp_path):
    red = Image.new("RGB", (8, 8))
    with pytest.raises(MoleTypeError, match="input_id_images or ip_adapter_image"):
        draw_identities(lambda prompt: None, {"a": [red]}, tmp_path / "x", SETTINGS)
    with pytest.raises(MoleTypeError, match="takes face"):
        draw_identities(Drawer(), {"a": [red]}, tmp_path / "x", replace(SETTINGS, argument="face"))
    with pytest.raises(MoleValueError, match=r"'a'.*at least one picture"):
        draw_identities(Drawer(), {"a": []}, tmp_path / "x", SETTINGS)
    with pytest.raises(MoleFileError):
        draw_identities(Drawer(), {"a": [tmp_path / "none.png"]}, tmp_path / "x", SETTINGS)
    with pytest.raises(MoleValueError, match="prompts"):
        IdentityPictures(())
    assert not (tmp_path / "x" / "a").exists()


class ColourFaces:
    """The face is the picture's colour; black ones have none."""

    dim = 3

    def __call__(self, pictures):
        colours = torch.tensor([p.convert("RGB").resize((1, 1)).getpixel((0, 0)) for p in pictures]).float()
        if (colours.norm(dim=1) < 10).any():
            raise MoleValueError("ColourFaces", expected="a face", got="none")
        return colours


def test_pictures_of_another_face_are_left_out(tmp_path):
    folder = tmp_path / "people" / "anna"
    folder.mkdir(parents=True)
    colours = [(200, 10, 0), (190, 0, 20), (210, 0, 0), (0, 0, 200), (0, 0, 0)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(b"broken")
    accept = SameFace(ColourFaces(), 0.9).for_folder(folder)
    said = [accept(Image.new("RGB", (4, 4), colour)) for colour in colours]
    assert (
        said[:3] == [None] * 3
        and "another's" in said[3]
        and "cosine 0.10" in said[3]
        and "no face" in said[4]
    )
    # by a reference the blue one is right
    by_reference = SameFace(ColourFaces(), 0.9, {"anna": [Image.new("RGB", (4, 4), (0, 0, 90))]})
    accept = by_reference.for_folder(folder)
    assert accept(Image.new("RGB", (4, 4), colours[3])) is None
    assert accept(Image.new("RGB", (4, 4), colours[0])) is not None
    with pytest.raises(MoleValueError, match="a cosine"):
        SameFace(ColourFaces(), 1.5)
    # through the data set: an identity of nobody's face is passed over
    other = tmp_path / "people" / "nobody"
    other.mkdir()
    Image.new("RGB", (16, 16)).save(other / "0.png")
    with pytest.warns(UserWarning, match="shows a face"):
        files = train_identities(
            tiny_pipeline(),
            tmp_path / "people",
            tmp_path / "work",
            TRAINING,
            accept=SameFace(ColourFaces(), 0.9),
            progress=False,
        )
    assert list(files) == ["anna"] and len(list((tmp_path / "work/pictures/anna").glob("*.png"))) == 3
    about = json.loads((tmp_path / "work/experts/anna.json").read_text())
    assert about["pictures"] == 3 and about["steps"] == TRAINING.config.steps and about["seconds"] > 0


def test_the_prior_weighs_the_class_pictures(tmp_path):
    pipe = tiny_pipeline()
    write_people(tmp_path, "ab", pictures=3)
    own, prior = (
        picture_batches(pipe, _folder(tmp_path / name, f"text {name}"), size, progress=False)
        for name, size in (("a", 1), ("b", 2))
    )
    batch = PriorBatches(own, prior, 0.5).batch(0)
    assert batch["latents"].shape[0] == 3 and batch["mask"][:, 0, 0, 0].tolist() == [1.0, 0.25, 0.25]
    g = torch.Generator().manual_seed(0)
    noise, t = torch.randn(batch["latents"].shape, generator=g), torch.tensor([10, 400, 700])
    text = batch["encoder_hidden_states"]

    def loss(rows, mask=None):
        return denoising_loss(
            pipe.unet, pipe.scheduler, batch["latents"][rows], t[rows], noise[rows], text[rows], mask=mask
        )

    want = (loss([0]) + 0.5 * loss([1, 2])) / 1.5
    torch.testing.assert_close(loss([0, 1, 2], batch["mask"]), want)
    both = PriorBatches(own, prior, 0.5)
    both.load_state_dict(both.state_dict())
    with pytest.raises(MoleStateError, match="weight"):
        PriorBatches(own, prior, 1.0).load_state_dict(both.state_dict())
    with pytest.raises(MoleValueError, match="weight"):
        PriorBatches(own, prior, -1)
    Image.new("RGB", (32, 32)).save(tmp_path / "b" / "0.png")
    larger = picture_batches(pipe, PictureFolder(tmp_path / "b", (32, 32), multiple=2), 1, progress=False)
    with pytest.raises(MoleStateError, match="class pictures of latents"):
        PriorBatches(own, larger).batch(0)


def _folder(root, text):
    for path in root.glob("*.png"):
        path.with_suffix(".txt").write_text(text)
    return PictureFolder(root, (16, 16), multiple=2)


def test_a_rare_token_and_a_prior_train_another_expert(tmp_path):
    pipe = tiny_pipeline()
    write_people(tmp_path / "people", "a")
    draw_class(Drawer(), tmp_path / "class", "one", 3, num_inference_steps=2)
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    dreambooth = replace(TRAINING, caption="one {} two", token="seven", prior=1.0)
    options = {"accept": MinimumSize(16), "progress": False}
    plain = train_identities(pipe, tmp_path / "people", tmp_path / "plain", TRAINING, **options)
    files = train_identities(
        pipe, tmp_path / "people", tmp_path / "db", dreambooth, class_pictures=tmp_path / "class", **options
    )
    lines = (tmp_path / "db/pictures/a/metadata.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} == {"one seven two"}
    one, other = (load_expert(file) for file in (plain["a"], files["a"]))
    key = next(iter(one.layers))
    assert not torch.allclose(one.layers[key].up, other.layers[key].up)
    for wrong, pictures in ((dreambooth, None), (TRAINING, tmp_path / "class")):
        with pytest.raises(MoleValueError, match="class_pictures"):
            train_identities(
                pipe, tmp_path / "people", tmp_path / "w", wrong, class_pictures=pictures, **options
            )
    with pytest.raises(MoleValueError, match="for the token"):
        replace(TRAINING, token="sks")
    with pytest.raises(MoleValueError, match="prior"):
        replace(TRAINING, prior=-1.0)
