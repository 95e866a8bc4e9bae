"""Latents and text states kept on the disk: what they are, when they are made anew, and the batches made of
them.
"""

import os
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleStateError, MoleTypeError, MoleValueError, MoleWarning
from mole_kernels.files.reader import SafetensorsFile
from mole_kernels.training import cached, store
from mole_kernels.training.cached import picture_batches
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import BatchStream
from mole_kernels.training.encode import Encoder
from mole_kernels.training.loop import fit
from mole_kernels.training.loss import DenoisingLoss
from mole_kernels.training.pictures import PictureFolder

sys.path.insert(0, str(Path(__file__).parent))
from pipelines import sd_pipeline, sdxl_pipeline

SIZES = {
    "a": (16, 16),
    "b": (16, 16),
    "c": (16, 48),
    "d": (16, 48),
    "e": (16, 16),
    "f": (48, 16),
    "g": (16, 16),
}
WORDS = dict(zip(SIZES, ["one blank two", "three", "four", "one blank two", "five", "six", "seven"]))


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "set")


def make(root, sizes=SIZES):
    root.mkdir()
    for i, (name, (h, w)) in enumerate(sizes.items()):
        image = Image.new("RGB", (w, h), (30 * i, 255 - 30 * i, 7))
        image.putpixel((i, 0), (255, 255, 255))
        image.save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(WORDS[name])
    return root


def folder(root):
    return PictureFolder(root, 16, buckets=[(16, 16), (8, 24), (24, 8)], multiple=8)


def batches(pipe, root, size=2, **options):
    return picture_batches(pipe, folder(root), size, **({"progress": False} | options))


def names(source, count):
    return [source.describe(n) for n in range(count)]


def counted(pipe, monkeypatch):
    """[pictures encoded, captions encoded] from now on."""
    calls = [0, 0]
    latents, text = Encoder.latents, Encoder.text

    def count_latents(self, pixels, generators=None):
        calls[0] += len(pixels)
        return latents(self, pixels, generators)

    def count_text(self, captions):
        calls[1] += len([c for c in captions if c])
        return text(self, captions)

    monkeypatch.setattr(Encoder, "latents", count_latents)
    monkeypatch.setattr(Encoder, "text", count_text)
    return calls


@pytest.mark.parametrize("make_pipe", [sd_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_batches_hold_what_the_pipeline_itself_makes(root, tmp_path, make_pipe, where):
    pipe = make_pipe()
    found = batches(pipe, root, cache=tmp_path / "cache" if where == "disk" else None)
    for n in range(found.per_epoch):
        batch = found.batch(n)
        for row, name in enumerate(found.describe(n).split(", ")):
            i = [p.name for p in found.folder].index(name)
            pixels = found.folder.pixels(i)[None]
            latents = pipe.vae.encode(pixels).latent_dist.mean * 0.5
            torch.testing.assert_close(batch["latents"][row], latents[0])
            caption = WORDS[name[0]]
            made = (
                pipe.encode_prompt(caption, "cpu", 1, False)
                if make_pipe is sd_pipeline
                else pipe.encode_prompt(
                    caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            )
            torch.testing.assert_close(batch["encoder_hidden_states"][row], made[0][0])
            if make_pipe is sdxl_pipeline:
                torch.testing.assert_close(batch["text_embeds"][row], made[2][0])
                assert batch["time_ids"][row].tolist() == [*SIZES[name[0]], 0, 0, *found.folder[i].bucket]
    assert ("text_embeds" in found.null) == (make_pipe is sdxl_pipeline)
    # SDXL says that it was trained with zeros for the empty caption
    assert found.null["encoder_hidden_states"].any() == (make_pipe is sd_pipeline)


def test_every_epoch_has_every_picture_once_and_one_bucket_a_batch(root):
    found = batches(sd_pipeline(), root)
    assert found.per_epoch == 4
    epochs = [
        [name for n in range(4 * e, 4 * e + 4) for name in found.describe(n).split(", ")] for e in range(3)
    ]
    assert all(sorted(epoch) == [f"{name}.png" for name in SIZES] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert (
        names(batches(sd_pipeline(), root), 12)
        == names(found, 12)
        != names(batches(sd_pipeline(), root, seed=1), 12)
    )
    shapes = {tuple(found.batch(n)["latents"].shape[2:]) for n in range(4)}
    assert shapes == {(8, 8), (4, 12), (12, 4)}
    stream = iter(found)
    assert torch.equal(next(stream)["latents"], found.batch(0)["latents"]) and torch.equal(
        next(stream)["latents"], found.batch(1)["latents"]
    )


def test_what_is_there_is_not_made_again(root, tmp_path, monkeypatch):
    pipe = sd_pipeline()
    calls = counted(pipe, monkeypatch)
    first = batches(pipe, root, cache=tmp_path / "cache")
    assert calls == [7, 6]
    again = batches(pipe, root, cache=tmp_path / "cache")
    assert calls == [7, 6] and again.size.missing == 0
    assert all(
        torch.equal(first.batch(n)[key], again.batch(n)[key]) for n in range(4) for key in first.batch(n)
    )
    # one picture changes, one gets a known caption, one is renamed: one is encoded anew
    Image.new("RGB", (16, 16), (1, 2, 3)).save(root / "a.png")
    (root / "b.txt").write_text("seven")
    for ending in (".png", ".txt"):
        (root / f"g{ending}").rename(root / f"z{ending}")
    batches(pipe, root, cache=tmp_path / "cache")
    assert calls == [8, 6]
    # another VAE leaves the captions as they are, another text encoder the latents; another dtype is another
    # cache
    with torch.no_grad():
        pipe.vae.encoder.conv_in.bias += 1
    batches(pipe, root, cache=tmp_path / "cache")
    assert calls == [15, 6]
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight += 1
    batches(pipe, root, cache=tmp_path / "cache")
    assert calls == [15, 11]
    batches(pipe, root, cache=tmp_path / "cache", dtype=torch.float16)
    assert calls == [22, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_known_before_and_right(root, tmp_path, dtype):
    told = []
    found = batches(
        sd_pipeline(),
        root,
        cache=tmp_path / "cache",
        dtype=dtype,
        on_size=lambda size: told.append((size, (tmp_path / "cache").exists())),
    )
    assert told == [(found.size, False)]
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    data = {"latents": 0, "texts": 0}
    for path in shards:
        with SafetensorsFile(path) as file:
            data[path.parent.name.split("-")[0]] += sum(
                entry.end - entry.begin for entry in file.header.entries.values()
            )
    assert (data["latents"], data["texts"]) == (found.size.latents, found.size.texts)
    assert (
        found.size.latents == 4 * (4 * 64 + 3 * 48) * dtype.itemsize
        and found.size.texts == 6 * 5 * 12 * dtype.itemsize
    )
    on_disk = sum(path.stat().st_size for path in shards)
    assert 0.8 * found.size.total < on_disk <= found.size.total == found.size.missing


def test_a_disk_without_room_is_told_before_anything_is_written(root, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(0, 0, 5000))
    with pytest.raises(MoleFileError, match=r"expected room for [\d,]+ bytes, got 5,000 free"):
        batches(sd_pipeline(), root, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_fills_up_keeps_the_shards_there_are(root, tmp_path, monkeypatch):
    pipe, write, room = sd_pipeline(), os.fsync, [3]

    def full(handle):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return write(handle)

    monkeypatch.setattr(store, "SHARD_TENSORS", 2)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(MoleFileError, match="No space left"):
            batches(pipe, root, cache=tmp_path / "cache")
    shards = list((tmp_path / "cache").rglob("*.safetensors"))
    assert shards and not list((tmp_path / "cache").rglob("*.tmp"))
    calls = counted(pipe, monkeypatch)
    found = batches(pipe, root, cache=tmp_path / "cache")
    assert calls[0] == 7 and 0 < calls[1] < 6 and len(names(found, 4)) == 4


def test_many_shards_are_not_all_open_at_once(root, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_TENSORS", 1)
    monkeypatch.setattr(store, "MOST_OPEN", 2)
    pipe = sd_pipeline()
    found = batches(pipe, root, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 13
    wanted = batches(pipe, root)
    for n in range(8):
        assert all(torch.equal(value, wanted.batch(n)[key]) for key, value in found.batch(n).items())
        assert len(found._latents._open) <= 2 and len(found._texts._open) <= 2


def test_a_broken_shard_is_named_and_made_anew(root, tmp_path, monkeypatch):
    pipe = sd_pipeline()
    first = batches(pipe, root, cache=tmp_path / "cache")
    wanted = [first.batch(n) for n in range(4)]
    shard = next((tmp_path / "cache").glob("latents-*/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    calls = counted(pipe, monkeypatch)
    with pytest.warns(MoleWarning, match="shard-000-00000(.|\n)*left out"):
        again = batches(pipe, root, cache=tmp_path / "cache")
    assert calls == [7, 0]
    assert all(torch.equal(again.batch(n)[key], wanted[n][key]) for n in range(4) for key in wanted[n])


def test_samples_of_the_posterior_belong_to_their_picture(root):
    pipe = sd_pipeline()
    with torch.no_grad():
        # random weights leave next to no spread
        pipe.vae.quant_conv.bias[4:] = 0.0
    mean, one = batches(pipe, root), batches(pipe, root, posterior="sample")
    again, other = (
        batches(pipe, root, posterior="sample", encode_batch=1),
        batches(pipe, root, posterior="sample", seed=1),
    )
    latents = [
        source._latents.get(cached.latent_id(source.folder[0]))["latents"]
        for source in (mean, one, again, other)
    ]
    torch.testing.assert_close(latents[1], latents[2])
    assert (latents[0] - latents[1]).abs().max() > 0.1 and (latents[1] - latents[3]).abs().max() > 0.1


def loss_after(pipe, source, steps, run_dir=None, resume=False):
    torch.manual_seed(1)
    unet = pipe.unet
    config = TrainConfig(steps=steps, lr=1e-2, checkpoint_every=1, cond_dropout=0.2)
    loss = DenoisingLoss(pipe.scheduler, source.null, config.cond_dropout)
    return fit(
        unet,
        [unet.conv_in.weight],
        source,
        config,
        loss_fn=loss,
        run_dir=run_dir,
        resume=resume,
        progress=False,
    ).losses


@pytest.mark.parametrize("make_pipe", [sd_pipeline, sdxl_pipeline])
def test_resume_in_the_middle_of_an_epoch_is_bit_for_bit(root, tmp_path, make_pipe):
    cache = tmp_path / "cache"
    whole, broken = make_pipe(), make_pipe()
    losses = loss_after(whole, batches(whole, root, cache=cache), 6)
    loss_after(broken, batches(broken, root, cache=cache), 3, tmp_path / "run")
    broken = make_pipe()
    assert loss_after(broken, batches(broken, root, cache=cache), 6, tmp_path / "run", resume=True) == losses
    assert torch.equal(whole.unet.conv_in.weight, broken.unet.conv_in.weight)
    assert len(set(losses)) == 6


def test_resume_with_other_data_names_what_differs(root, tmp_path):
    pipe = sd_pipeline()
    stream = BatchStream(batches(pipe, root))
    stream.draw()
    state = stream.state()

    def refused(message, **options):
        with pytest.raises(MoleStateError, match=message):
            BatchStream(batches(pipe, root, **options)).restore(state)

    BatchStream(batches(pipe, root)).restore(state)
    refused("batch_size: expected 2 as when the run began, got 3", size=3)
    refused("seed: expected 0", seed=4)
    refused("dtype: expected 'torch.float32'", dtype=torch.float16)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.bias += 1
    refused("vae: expected")
    pipe = sd_pipeline()
    (root / "c.txt").write_text("nine")
    refused(r"c\.png: has another content, caption or size since the run began")
    (root / "c.png").unlink()
    refused(r"c\.png: is gone since")
    make(root.parent / "other", {"a": (16, 16)})
    (root / "h.png").write_bytes((root.parent / "other" / "a.png").read_bytes())
    (root / "h.txt").write_text("h")
    (root.parent / "other" / "a.png").rename(root / "c.png")
    refused(r"c\.png: has another")
    # too many pictures to name each: one checksum
    unnamed = {**state, "source": state["source"] | {"pictures": {}}}
    with pytest.raises(MoleStateError, match="samples: expected 7"):
        BatchStream(batches(pipe, root)).restore(unnamed)


def test_another_caption_among_more_pictures_than_are_named(root, monkeypatch):
    monkeypatch.setattr(cached, "NAMED", 0)
    pipe = sd_pipeline()
    state = BatchStream(batches(pipe, root)).state()
    BatchStream(batches(pipe, root)).restore(state)
    (root / "c.txt").write_text("nine")
    with pytest.raises(MoleStateError, match="pictures or captions are not those"):
        BatchStream(batches(pipe, root)).restore(state)


def test_two_processes_take_turns(root):
    source = batches(sd_pipeline(), root)
    streams = [BatchStream(source, process, 2) for process in range(2)]
    drawn = [stream.draw() for _ in range(3) for stream in streams]
    assert [number for number, _ in drawn] == list(range(6))
    assert all(torch.equal(batch["latents"], source.batch(number)["latents"]) for number, batch in drawn)


def test_a_loss_that_is_not_finite_names_the_pictures(root):
    source = batches(sd_pipeline(), root)
    model = torch.nn.Linear(1, 1)

    def loss_fn(model, batch, generator):
        return model.weight.sum() * (float("nan") if batch["latents"].shape[-1] == 12 else 1.0)

    wide = next(n for n in range(4) if "c.png" in source.describe(n))
    with pytest.raises(
        MoleStateError, match=rf"step {wide + 1}: the loss is nan \(batch {wide}: [cd]\.png, [cd]\.png\)"
    ):
        fit(model, [model.weight], source, TrainConfig(steps=4), loss_fn=loss_fn, progress=False)


def test_what_cannot_be_encoded(root):
    with pytest.raises(MoleTypeError, match="a diffusers pipeline with a vae and encode_prompt, got Linear"):
        Encoder(torch.nn.Linear(1, 1))
    pipe = sd_pipeline()
    with pytest.raises(MoleValueError, match="posterior"):
        Encoder(pipe, "mode")
    with pytest.raises(MoleValueError, match="batch_size"):
        batches(pipe, root, size=0)
    odd = PictureFolder(root, (15, 15), multiple=5)
    with pytest.raises(MoleValueError, match="multiples of the VAE's 2, got 15"):
        picture_batches(pipe, odd, 1, progress=False)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(MoleFileError, match=r"\w\.png: its latent is not finite"):
        batches(pipe, root)
    found = folder(root)
    (root / "b.png").unlink()
    with pytest.raises(MoleFileError, match=r"b\.png: is gone since|b\.png: is no picture"):
        picture_batches(sd_pipeline(), found, 1, progress=False)


def test_a_vae_that_overflows_in_half_precision_is_widened_for_the_while(root):
    pipe = sd_pipeline()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.half()
    seen = []
    pipe.vae.encoder.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    found = Encoder(pipe)
    found.latents(torch.zeros(1, 3, 16, 16))
    assert seen == [torch.float32] and found.dtype == torch.float16


def test_progress_of_encoding_is_shown(root, capfd):
    batches(sd_pipeline(), root, progress=True, encode_batch=3)
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("encoding 7/7") and "samples/s" in lines[-1]
