"""ED-LoRA as the paper's code trains it: its two losses against formulas written out, its variations, resumption."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleError, MoleFileError, MoleStateError, MoleValueError
from mole_kernels.methods.mix_of_show.attention_loss import PaperAttentionLoss
from mole_kernels.methods.mix_of_show.augment import TEMPLATES, Augmentation
from mole_kernels.methods.mix_of_show.augmented import AugmentedConcept, ConceptPicture
from mole_kernels.methods.mix_of_show.edlora import EDLoRATraining, train_edlora
from mole_kernels.methods.mix_of_show.prompts import encode_prompts, layered
from mole_kernels.methods.mix_of_show.tokens import concept_tokens, cross_attentions
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.loss import denoising_error, denoising_loss
from tests.methods.concepts import random_concept
from tests.training.pipelines import sd_pipeline, sdxl_pipeline

TOKENS = {"<v1>": "<rand-0.013>", "<v2>": "three"}
CONFIG = TrainConfig(steps=3, lr=1e-2, weight_decay=0.0, mixed_precision="no")
TRAINING = EDLoRATraining(
    CONFIG, embedding_lr=1e-1, text_encoder_lr=1e-2, rank=2, norm_limit=None, masked=True, attention=0.01
)


def probabilities(module, hidden, states):
    """[B,heads,P,T] place by place."""
    q, k = module.to_q(hidden), module.to_k(states)
    B, heads = q.shape[0], module.heads
    q, k = (t.view(B, t.shape[1], heads, -1).permute(0, 2, 1, 3) for t in (q, k))
    return torch.softmax(torch.einsum("bhpd,bhtd->bhpt", q, k) / q.shape[-1] ** 0.5, -1)


def by_the_formulas(seen, ids, own, mask, full_identity):
    """The paper's: one map a resolution over all heads, scaled by its largest value of the batch."""
    by_side: dict[int, list] = {}
    for probs in seen:
        by_side.setdefault(round(probs.shape[2] ** 0.5), []).append(probs)
    total = 0.0
    for side, layers in by_side.items():
        heads = torch.cat(layers, 1).mean(1)
        first, second = [], []
        for row, text in zip(heads, ids[:, 0]):
            places = [i for i, token in enumerate(text.tolist()) if token in own]
            first.append(row[:, places[0]].view(side, side))
            second.append(row[:, places[1]].view(side, side))
        adjective, subject = torch.stack(first), torch.stack(second)
        adjective, subject = adjective / adjective.max(), subject / subject.max()
        wanted = torch.nn.functional.interpolate(mask, (side, side), mode="nearest")[:, 0]
        if full_identity:
            total = total + ((subject - wanted) ** 2).mean()
        else:
            total = total + subject[wanted == 0].mean()
        total = total + adjective[wanted == 0].mean()
    return total


@pytest.mark.parametrize("full_identity", [True, False], ids=["clothes too", "person alone"])
def test_value_and_gradient_of_the_attention_loss_are_those_of_the_formulas(full_identity):
    pipe = sd_pipeline()
    concept = random_concept(pipe, 0)
    torch.manual_seed(1)
    latents, mask = torch.randn(2, 4, 8, 8), (torch.rand(2, 1, 8, 8) > 0.5).float()
    with concept_tokens(pipe, concept.embeddings) as tokens:
        text = encode_prompts(pipe, ["<a0> <b0>", "three <a0> <b0>"], tokens)
        loss_fn = PaperAttentionLoss(pipe.unet, tokens, full_identity)
        weights = [m.to_q.weight for m in cross_attentions(pipe.unet).values()]
        seen = []

        def look(module, args, kwargs):
            seen.append(probabilities(module, args[0], kwargs["encoder_hidden_states"]))

        for weight in weights:
            weight.requires_grad_(True)
        with layered(pipe.unet, text.tokens), loss_fn.listening():
            hooks = [
                m.register_forward_pre_hook(look, with_kwargs=True)
                for m in cross_attentions(pipe.unet).values()
            ]
            pipe.unet(latents, 10, encoder_hidden_states=text.flat)
            got = loss_fn.take(text.ids["text_encoder"], mask)
            for hook in hooks:
                hook.remove()
        own = {i for token in ("<a0>", "<b0>") for i in tokens.ids[token]["text_encoder"]}
        want = by_the_formulas(seen, text.ids["text_encoder"], own, mask, full_identity)
        grads = [torch.autograd.grad(value, weights, retain_graph=True) for value in (got, want)]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert want > 0.1
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_a_batch_inside_its_masks_has_no_attention_loss_and_one_token_is_the_subject():
    pipe = sd_pipeline()
    concept = random_concept(pipe, 0)
    torch.manual_seed(1)
    latents = torch.randn(1, 4, 8, 8)
    for prompt, count in (("<a0> <b0>", 2), ("<b0> three", 1)):
        with concept_tokens(pipe, concept.embeddings) as tokens:
            text = encode_prompts(pipe, [prompt], tokens)
            loss_fn = PaperAttentionLoss(pipe.unet, tokens)
            assert loss_fn._places(text.ids["text_encoder"]).shape == (1, count)
            values = []
            for mask in (torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)):
                with layered(pipe.unet, text.tokens), loss_fn.listening():
                    pipe.unet(latents, 10, encoder_hidden_states=text.flat)
                    values.append(float(loss_fn.take(text.ids["text_encoder"], mask)))
            assert values[0] == 0.0 < values[1]
            with pytest.raises(MoleStateError, match="no cross-attention"):
                loss_fn.take(text.ids["text_encoder"], mask)
            with pytest.raises(MoleStateError, match="no token"):
                loss_fn._places(torch.zeros(1, 4, 5, dtype=torch.int64))


def test_value_and_gradient_of_the_masked_loss_are_those_of_the_formula():
    pipe = sd_pipeline()
    torch.manual_seed(0)
    latents, noise, mask = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.rand(3, 1, 8, 8)
    t, text = torch.tensor([5, 100, 900]), torch.randn(3, 5, 12)
    weight = pipe.unet.conv_in.weight.requires_grad_(True)
    got = denoising_loss(pipe.unet, pipe.scheduler, latents, t, noise, text, mask=mask, per_picture=True)
    error = denoising_error(pipe.unet, pipe.scheduler, latents, t, noise, text)
    each = [sum((error[b, c] * mask[b, 0]).sum() for c in range(4)) / mask[b].sum() for b in range(3)]
    want = sum(each) / 3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    a, b = (torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    # a picture whose mask is empty asks for nothing
    mask[0] = 0
    got = denoising_loss(pipe.unet, pipe.scheduler, latents, t, noise, text, mask=mask, per_picture=True)
    torch.testing.assert_close(got, (each[1] + each[2]) / 3, rtol=1e-5, atol=1e-6)


def image(width, height, left=0):
    picture = Image.new("RGB", (width, height), (200, 100, 50))
    picture.paste((0, 0, 255), (left, 0, left + width // 4, height // 4))
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width, height // 2))
    return picture, mask


@pytest.mark.parametrize("kind", ["person", "object"])
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (32, 32), (20, 90)], ids=str)
def test_a_picture_lies_somewhere_on_the_square_and_its_mask_with_it(kind, size):
    augmentation = Augmentation(32, kind, crop=0.5, scale=(0.5, 1.0), flip=0.5)
    picture, mask = image(*size)
    places, shapes = set(), set()
    for seed in range(40):
        pixels, own, there = augmentation.place(picture, mask, random.Random(seed))
        assert pixels.shape == (3, 32, 32) and own.shape == there.shape == (32, 32)
        rows, columns = there.any(1).nonzero()[:, 0], there.any(0).nonzero()[:, 0]
        assert there[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        # black around, never black inside; the mask nowhere but inside
        assert (pixels[:, there == 0] == -1).all() and (pixels[:, there == 1].amax(0) > -0.6).all()
        assert (own[there == 0] == 0).all()
        places.add((int(rows[0]), int(columns[0])))
        shapes.add((len(rows), len(columns)))
        if kind == "person":
            assert max(shapes, key=max)[0] <= 32 and 32 in (len(rows), len(columns))
    assert len(places | shapes) > (1 if size == (32, 32) and kind == "person" else 3)
    again = augmentation.place(picture, mask, random.Random(3))
    assert torch.equal(again[0], augmentation.place(picture, mask, random.Random(3))[0])
    # without a mask the same picture
    assert augmentation.place(picture, None, random.Random(3))[1] is None


def test_an_upright_person_keeps_the_top():
    picture, mask = image(20, 60)
    for seed in range(20):
        pixels, own, there = Augmentation(32, crop=1.0).place(picture, mask, random.Random(seed))
        top = there.any(1).nonzero()[0, 0]
        column = there.any(0).nonzero()[0, 0]
        # the blue corner of the top and the mask's upper half are there
        assert pixels[2, top, column] > 0.5 and own[top, column] == 1


def test_captions_are_shuffled_behind_what_stays_and_put_into_templates():
    augmentation = Augmentation(32, shuffle_after=1, templates=("a {} b", "c {}"))
    said = {augmentation.caption("<v1> <v2>, one, two, three", random.Random(seed)) for seed in range(60)}
    assert len(said) == 12 and all("<v1> <v2>, " in text for text in said)
    assert Augmentation(32).caption("x, y", random.Random(0)) == "x, y"
    assert all("{}" in text for texts in TEMPLATES.values() for text in texts)
    for wrong in (
        {"kind": "scene"},
        {"crop": 1.5},
        {"scale": (0.5, 2.0)},
        {"scale": (0.9, 0.5)},
        {"templates": ("none",)},
        {"size": 0},
    ):
        with pytest.raises(MoleValueError, match="Augmentation"):
            Augmentation(**({"size": 32} | wrong))


@pytest.fixture
def pictures(tmp_path):
    found = []
    for i, size in enumerate([(20, 30), (30, 20), (24, 24)]):
        picture, mask = image(*size, left=i)
        picture.save(tmp_path / f"{i}.png")
        mask.save(tmp_path / f"{i}_mask.png")
        found.append(ConceptPicture(tmp_path / f"{i}.png", "<TOK>", tmp_path / f"{i}_mask.png"))
    return found


AUGMENTATION = Augmentation(16, shuffle_after=1, templates=("{}", "one {}"))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_step_sees_another_sample_and_batches_depend_on_their_number_alone(kind, pictures):
    pipe = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}[kind]()
    batches = AugmentedConcept(pipe, pictures, TOKENS, 2, AUGMENTATION, seed=3)
    again = AugmentedConcept(pipe, pictures, TOKENS, 2, AUGMENTATION, seed=3)
    drawn = [batches.batch(n) for n in range(6)]
    for n in (5, 0):
        other = again.batch(n)
        assert other.keys() == drawn[n].keys()
        assert all(torch.equal(value, drawn[n][key]) for key, value in other.items())
    assert drawn[0]["latents"].shape == (2, 4, 8, 8) == (*drawn[0]["mask"].shape[:1], 4, 8, 8)
    assert drawn[0]["image_mask"].shape == (2, 1, 8, 8)
    assert (drawn[0]["mask"] <= drawn[0]["image_mask"] + 1e-6).all()
    assert ("time_ids" in drawn[0]) == (kind == "sdxl")
    # each picture four times in six batches of two, never the same latents twice
    rows = torch.cat([batch["latents"] for batch in drawn]).flatten(1)
    assert len(rows.unique(dim=0)) == 12
    names = " ".join(batches.describe(n) for n in range(6))
    assert [names.count(f"{i}.png") for i in range(3)] == [4, 4, 4]


def test_training_on_varied_pictures_goes_on_to_the_same_end(pictures, tmp_path):
    def train(training=TRAINING, augmentation=AUGMENTATION, **run):
        pipe = sd_pipeline()
        batches = AugmentedConcept(pipe, pictures, TOKENS, 2, augmentation)
        return train_edlora(pipe, batches, TOKENS, training, progress=False, **run)

    whole = train()
    train(replace(TRAINING, config=replace(CONFIG, steps=2)), run_dir=tmp_path / "run")
    again = train(run_dir=tmp_path / "run", resume=True)
    for path, layer in whole.expert.layers.items():
        assert torch.equal(again.expert.layers[path].up, layer.up) and layer.up.any()
    with pytest.raises(MoleStateError, match="augmentation"):
        train(augmentation=replace(AUGMENTATION, crop=0.1), run_dir=tmp_path / "run", resume=True)
    other = train(replace(TRAINING, mask_form="batch", attention_form="per_layer"))
    plain = train(replace(TRAINING, masked=False, attention=0.0))
    key = next(path for path in whole.expert.layers if "attn2.to_v" in path)
    tops = [c.expert.layers[key].up for c in (whole, other, plain)]
    assert all((tops[i] - tops[j]).abs().max() > 1e-6 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_what_cannot_be_varied_is_named(pictures, tmp_path):
    pipe = sd_pipeline()

    def make(pictures, augmentation=AUGMENTATION, batch_size=2):
        return AugmentedConcept(pipe, pictures, TOKENS, batch_size, augmentation)

    Image.new("L", (90, 10)).save(tmp_path / "long.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    first = pictures[0]
    for bad, error, match in (
        ([], MoleValueError, "pictures and a batch size"),
        ([first, replace(pictures[1], mask=None)], MoleValueError, "all pictures or for none"),
        ([replace(first, caption="three")], MoleValueError, r"0\.png.*<TOK>"),
        ([replace(first, caption="three three <TOK>")], MoleValueError, "cuts <v"),
        ([replace(first, mask=tmp_path / "long.png")], MoleFileError, "90:10"),
        ([replace(first, mask=tmp_path / "broken.png")], MoleFileError, r"broken\.png"),
        ([replace(first, path=tmp_path / "broken.png")], MoleFileError, r"broken\.png"),
    ):
        with pytest.raises(error, match=match):
            make(bad)
    with pytest.raises(MoleValueError, match="multiple of the VAE's 2"):
        make(pictures, Augmentation(15))
    unmasked = make([replace(picture, mask=None) for picture in pictures])
    with pytest.raises(MoleError, match="masks"):
        train_edlora(pipe, unmasked, TOKENS, TRAINING, progress=False)
    with pytest.raises(MoleValueError, match="mask_form"):
        train_edlora(pipe, make(pictures), TOKENS, replace(TRAINING, mask_form="x"), progress=False)
