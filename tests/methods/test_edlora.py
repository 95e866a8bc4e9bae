"""ED-LoRA: one text per layer, what trains and what stays, its options, its files, and bad input."""

from __future__ import annotations

import shutil
import sys
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleError, MoleFileError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.methods.mix_of_show.attention_loss import AttentionLoss, attention_grid
from mole_kernels.methods.mix_of_show.concept import load_concept, save_concept
from mole_kernels.methods.mix_of_show.data import concept_batches
from mole_kernels.methods.mix_of_show.edlora import (
    EDLoRATraining,
    attention_linears,
    paper_training,
    train_edlora,
)
from mole_kernels.methods.mix_of_show.prompts import (
    _own_part,
    encode_prompts,
    layered,
    sample_concepts,
    token_ids,
)
from mole_kernels.methods.mix_of_show.tokens import (
    class_embedding,
    concept_tokens,
    cross_attentions,
    new_embeddings,
    text_encoders,
)
from mole_kernels.patching.apply import patch
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.pictures import PictureFolder
from tests.methods.concepts import random_concept
from tests.training.pipelines import sd_pipeline, sdxl_pipeline

PIPELINES = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}
TOKENS = {"<v1>": "<rand-0.013>", "<v2>": "three"}
CONFIG = TrainConfig(steps=3, lr=1e-2, weight_decay=0.0, mixed_precision="no")
TRAINING = EDLoRATraining(CONFIG, embedding_lr=1e-1, text_encoder_lr=1e-2, rank=2, norm_limit=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    (root / "masks").mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(3):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text("<TOK>" if i else "<v1> <v2> one")
        mask = torch.zeros(32, 32, dtype=torch.uint8)
        mask[:, : 16 if i else 8] = 255
        Image.fromarray(mask.numpy()).save(root / "masks" / f"{i}.png")
        (root / "masks" / f"{i}.txt").write_text("a mask")
    return root


def pictures(root):
    found = PictureFolder(root, 16, buckets=False, multiple=8)
    found.pictures = [p for p in found.pictures if "masks" not in p.name]
    return found


def state(pipe):
    return {
        f"{n}.{k}": v.clone()
        for n, m in pipe.components.items()
        if isinstance(m, torch.nn.Module)
        for k, v in m.state_dict().items()
    }


@pytest.mark.parametrize("kind", PIPELINES)
def test_layer_i_receives_text_i_from_down_over_mid_to_up(kind):
    pipe = PIPELINES[kind]()
    concept, seen = random_concept(pipe, 0), {}
    layers = cross_attentions(pipe.unet)
    assert [path.split(".")[0] for path in layers] == ["down_blocks", "mid_block", "up_blocks", "up_blocks"]
    with concept_tokens(pipe, concept.embeddings) as tokens:
        states = encode_prompts(pipe, [concept.name], tokens)
        # each layer's own variant by itself, through the tokenizer and encoders alone
        for i in range(len(layers)):
            text = concept.name.replace("<a0>", f"<new{i}>").replace("<b0>", f"<new{i + 4}>")
            alone = encode_prompts(pipe, [text], tokens).states
            torch.testing.assert_close(states.states[:, i], alone[:, i], rtol=1e-5, atol=1e-6)
        assert (states.states[:, 0] - states.states[:, 1]).abs().max() > 0.1
        with layered(pipe.unet, states.tokens):
            hooks = [
                m.to_k.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0]))
                for path, m in layers.items()
            ]
            sample_concepts(
                pipe,
                [concept.name] * 2,
                tokens,
                "one",
                num_inference_steps=1,
                height=16,
                width=16,
                output_type="latent",
            )
            for hook in hooks:
                hook.remove()
        against = encode_prompts(pipe, ["one"], tokens).states
    for i, path in enumerate(layers):
        want = torch.cat([against[:, i]] * 2 + [states.states[:, i]] * 2)
        torch.testing.assert_close(seen[path], want, rtol=1e-5, atol=1e-6)
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.mark.parametrize("kind", PIPELINES)
def test_prompts_without_concepts_are_drawn_as_ever(kind):
    pipe = PIPELINES[kind]()
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    want = pipe(
        "one two", negative_prompt="three", generator=torch.Generator().manual_seed(1), **options
    ).images
    with concept_tokens(pipe, random_concept(pipe, 0).embeddings) as tokens:
        got = sample_concepts(
            pipe, ["one two"], tokens, "three", generator=torch.Generator().manual_seed(1), **options
        ).images
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_embeddings_begin_as_the_paper_has_it():
    pipe = sd_pipeline()
    found = new_embeddings(pipe, {"<v1>": "<rand-0.5>", "<v2>": "three"}, torch.Generator().manual_seed(0))
    word = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("three</w>")]
    assert torch.equal(found["<v2>"]["text_encoder"], word.expand(4, -1))
    random = found["<v1>"]["text_encoder"]
    assert torch.equal(random, random[:1].expand(4, -1)) and 0.25 < random[0].std() < 0.75
    assert set(new_embeddings(sdxl_pipeline(), TOKENS, torch.Generator())["<v1>"]) == {
        "text_encoder",
        "text_encoder_2",
    }


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_concept_is_trained_and_nothing_else_changes(kind, folder, tmp_path):
    pipe = PIPELINES[kind]()
    before, words = state(pipe), pipe.tokenizer
    batches = concept_batches(pipe, pictures(folder), TOKENS, 2)
    concept = train_edlora(pipe, batches, TOKENS, TRAINING, progress=False)
    after = state(pipe)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert pipe.tokenizer is words and "<new0>" not in words.get_vocab()
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    start = new_embeddings(pipe, TOKENS, torch.Generator())
    assert concept.name == "<v1> <v2>" and set(concept.embeddings) == set(TOKENS)
    for encoder, value in concept.embeddings["<v2>"].items():
        moved = (value - start["<v2>"][encoder]).abs()
        # every layer's own embedding has moved, each in its own way
        assert moved.amax(1).min() > 0.05 and (value[0] - value[1]).abs().max() > 1e-3
    assert len(concept.expert.layers) == len(attention_linears(pipe)) and concept.expert.scales() == {1.0}
    # SDXL reads its first text encoder one layer before the last
    unread = "text_encoder.text_model.encoder.layers.1." if kind == "sdxl" else "nothing"
    assert all(
        bool(layer.up.any()) != path.startswith(unread) for path, layer in concept.expert.layers.items()
    )
    save_concept(concept, tmp_path / "v.pth")
    found = load_concept(tmp_path / "v.pth")
    with (
        concept_tokens(pipe, found.embeddings),
        patch(pipe, {"v": found.expert}, allow_large_rank=True) as handle,
    ):
        assert len(handle.layers) == len(concept.expert.layers)
    assert all(
        torch.equal(found.expert.layers[path].up, layer.up) for path, layer in concept.expert.layers.items()
    )
    assert all(
        torch.equal(found.embeddings[t][e], v)
        for t, own in concept.embeddings.items()
        for e, v in own.items()
    )


def train(folder, training, tokens=TOKENS, masks=None, **run):
    pipe = sd_pipeline()
    return train_edlora(
        pipe,
        concept_batches(pipe, pictures(folder), tokens, 3, masks=masks),
        tokens,
        training,
        progress=False,
        **run,
    )


def test_rates_are_each_groups_own(folder):
    start = new_embeddings(sd_pipeline(), {"<v2>": "three", "<v1>": "one"}, torch.Generator())
    both = {"<v1>": "one", "<v2>": "three"}
    concept = train(folder, replace(TRAINING, embedding_lr=0.0, text_encoder_lr=0.0), both)
    assert all(torch.equal(concept.embeddings[t]["text_encoder"], start[t]["text_encoder"]) for t in both)
    for path, layer in concept.expert.layers.items():
        assert bool(layer.up.any()) == path.startswith("unet.")
    # AdamW's first step is as long as its rate
    one = replace(TRAINING, config=replace(CONFIG, steps=1), embedding_lr=3e-2, text_encoder_lr=5e-3)
    concept = train(folder, one, both)
    moved = concept.embeddings["<v2>"]["text_encoder"] - start["<v2>"]["text_encoder"]
    assert moved.abs().max() == pytest.approx(3e-2, rel=1e-2)
    tops = {
        part: max(f.up.abs().max().item() for p, f in concept.expert.layers.items() if p.startswith(part))
        for part in ("unet", "text")
    }
    assert tops == pytest.approx({"unet": 1e-2, "text": 5e-3}, rel=1e-2)


def test_embeddings_stand_still_once_their_norm_is_at_the_limit(folder):
    free = train(folder, TRAINING)
    start = new_embeddings(sd_pipeline(), TOKENS, torch.Generator())["<v2>"]["text_encoder"]
    held = train(folder, replace(TRAINING, norm_limit=1e-4))
    assert torch.equal(held.embeddings["<v2>"]["text_encoder"], start)
    assert all(layer.up.any() for layer in held.expert.layers.values())
    # one step takes it past the limit, and there it stays
    first = train(folder, replace(TRAINING, config=replace(CONFIG, steps=1)))
    norms = [
        torch.cat([v["text_encoder"].norm(dim=-1) for v in c.embeddings.values()]).mean().item()
        for c in (held, first, free)
    ]
    assert norms[0] < norms[1]
    stopped = train(folder, replace(TRAINING, norm_limit=(norms[0] + norms[1]) / 2))
    for token in TOKENS:
        assert torch.equal(stopped.embeddings[token]["text_encoder"], first.embeddings[token]["text_encoder"])


def test_a_run_that_was_stopped_goes_on_to_the_same_end(folder, tmp_path):
    whole = train(folder, TRAINING)
    train(folder, replace(TRAINING, config=replace(CONFIG, steps=2)), run_dir=tmp_path / "run")
    again = train(folder, TRAINING, run_dir=tmp_path / "run", resume=True)
    assert torch.equal(again.embeddings["<v1>"]["text_encoder"], whole.embeddings["<v1>"]["text_encoder"])
    assert all(
        torch.equal(again.expert.layers[path].up, layer.up) for path, layer in whole.expert.layers.items()
    )
    with pytest.raises(MoleStateError, match="embedding_lr"):
        train(folder, replace(TRAINING, embedding_lr=1.0), run_dir=tmp_path / "run", resume=True)


@pytest.mark.parametrize("change", ["caption", "picture", "mask"])
def test_a_resume_with_other_data_is_refused_and_named(folder, tmp_path, change):
    own = tmp_path / "data"
    shutil.copytree(folder, own)

    def masked(**options):
        pipe = sd_pipeline()
        batches = concept_batches(pipe, pictures(own), TOKENS, 3, masks=own / "masks")
        return train_edlora(pipe, batches, TOKENS, TRAINING, progress=False, **options)

    masked(run_dir=tmp_path / "run")
    masked(run_dir=tmp_path / "run", resume=True)
    if change == "caption":
        (own / "1.txt").write_text("<TOK> one")
    else:
        path = own / "1.png" if change == "picture" else own / "masks" / "1.png"
        shutil.copy(folder / "0.png", path)
    name = {"caption": "ids_text_encoder", "picture": "latents", "mask": "mask"}[change]
    with pytest.raises(MoleStateError, match=f"resume: batches, {name}"):
        masked(run_dir=tmp_path / "run", resume=True)


def test_two_threads_draw_each_with_its_own_text():
    """Through the hooks of `layered`, which keep the part of the text that a layer took last."""
    length, layers = 2, 3
    last, failures = [], []

    def draw(value):
        states = torch.full((1, layers * length, 4), float(value))
        for _ in range(3000):
            (_, options) = _own_part(
                1, layers, length, last, None, (None,), {"encoder_hidden_states": states}
            )
            if float(options["encoder_hidden_states"][0, 0, 0]) != value:
                failures.append(value)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=draw, args=(value,)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures


def test_masks_noise_offset_and_attention_count(folder):
    pipe = sd_pipeline()
    batches = concept_batches(pipe, pictures(folder), TOKENS, 3, masks=folder / "masks")
    assert batches.tensors["mask"].shape == (3, 1, 8, 8)
    assert torch.equal(batches.tensors["mask"][0, 0], (torch.arange(8) < 2).float().expand(8, -1))
    losses = {}
    for name, change in {
        "plain": {},
        "masked": {"masked": True},
        "offset": {"noise_offset": 0.5},
        "attention": {"attention": 10.0},
        "gaussian": {"init": "gaussian"},
    }.items():
        seen = []
        train(
            folder,
            replace(TRAINING, **change),
            masks=folder / "masks",
            on_step=lambda _, loss, seen=seen: seen.append(loss),
        )
        losses[name] = seen
    assert (
        len({round(found[0], 6) for found in losses.values()}) == 4
        and losses["plain"][0] == losses["gaussian"][0]
    )
    assert losses["plain"][1] != losses["gaussian"][1]


def test_the_attention_loss_is_what_its_formula_says():
    pipe = sd_pipeline()
    concept = random_concept(pipe, 0)
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with concept_tokens(pipe, concept.embeddings) as tokens:
        states = encode_prompts(pipe, [concept.name, f"one {concept.name}"], tokens)
        loss = AttentionLoss(pipe.unet, tokens)
        seen = {}
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        hooks = [
            m.register_forward_pre_hook(
                lambda m, args, kwargs: seen.__setitem__(m, (args[0], kwargs["encoder_hidden_states"])),
                with_kwargs=True,
            )
            for m in loss.layers
        ]
        with layered(pipe.unet, states.tokens), loss.listening():
            # hooks that were there before `layered` see all layers' states
            pipe.unet(x, 3, states.flat)
            got = loss.take(states.ids["text_encoder"], mask).item()
        for hook in hooks:
            hook.remove()
    want = []
    for i, (module, (hidden, whole)) in enumerate(seen.items()):
        text = whole[:, i * 5 : (i + 1) * 5]
        q, k = module.head_to_batch_dim(module.to_q(hidden)), module.head_to_batch_dim(module.to_k(text))
        maps = module.get_attention_scores(q, k).unflatten(0, (2, -1)).mean(1)
        side = round(maps.shape[1] ** 0.5)
        wanted = (
            mask.unfold(2, 8 // side, 8 // side).unfold(3, 8 // side, 8 // side).mean((-1, -2)).flatten(1)
        )
        # "<a0> <b0>" after the start token, and one place later
        rows = [(maps[b, :, p], wanted[b]) for b, p in ((0, 1), (0, 2), (1, 2), (1, 3))]
        want.append(sum((a / a.max() - m).square().mean().item() for a, m in rows) / 4)
    assert got == pytest.approx(sum(want) / len(want), rel=1e-4)
    assert attention_grid(10, 4, 9) == (2, 5)
    with pytest.raises(MoleStateError, match="has run"):
        loss.take(states.ids["text_encoder"], mask)


def test_bad_input_is_named(folder, tmp_path):
    pipe = sd_pipeline()
    before = pipe.tokenizer
    good = concept_batches(pipe, pictures(folder), TOKENS, 2)
    for tokens, match in (
        ({"three": "one"}, "'three'.*already has"),
        ({"<v 1>": "one"}, "without spaces"),
        ({"<v1>": "one two"}, "one token"),
        ({"<v1>": "zebra"}, "one token"),
        ({"<v1>": "<rand-much>"}, "rand-0.013"),
        ({"<v": "one", "<v1>": "one"}, "collides"),
        ({}, "at least one token"),
    ):
        with pytest.raises(MoleValueError, match=match):
            train_edlora(pipe, good, tokens, TRAINING, progress=False)
    for change, match in (
        ({"noise_offset": -1.0}, "noise_offset"),
        ({"embedding_lr": float("nan")}, "embedding_lr"),
        ({"norm_limit": 0.0}, "norm_limit"),
        ({"masked": True}, "masks"),
        ({"attention": 0.1}, "masks"),
    ):
        with pytest.raises(MoleValueError, match=match):
            train_edlora(pipe, good, TOKENS, replace(TRAINING, **change), progress=False)
    (tmp_path / "x.txt").write_text("one two")
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    with pytest.raises(MoleValueError, match=r"x\.png.*<TOK>"):
        concept_batches(pipe, pictures(tmp_path), TOKENS, 1)
    (tmp_path / "x.txt").write_text("one two three <TOK>")
    with pytest.raises(MoleValueError, match=r"x\.png.*cuts <v1> off"):
        concept_batches(pipe, pictures(tmp_path), TOKENS, 1)
    (tmp_path / "x.txt").write_text("<TOK>")
    with pytest.raises(MoleFileError, match=r"mask for x\.png"):
        concept_batches(pipe, pictures(tmp_path), TOKENS, 1, masks=folder)
    with pytest.raises(MoleTypeError, match="text encoder"):
        text_encoders(object())
    with pytest.raises(MoleError):
        class_embedding(pipe, "text_encoder", "")
    assert pipe.tokenizer is before


def test_the_papers_rates():
    made = paper_training(100, seed=3)
    assert (made.config.lr, made.text_encoder_lr, made.embedding_lr) == (1e-4, 1e-5, 1e-3)
    assert (made.rank, made.alpha, made.noise_offset, made.norm_limit, made.config.schedule) == (
        4,
        1.0,
        0.01,
        0.55,
        "linear",
    )


def test_ids_are_those_of_each_layers_names():
    pipe = sd_pipeline()
    concept = random_concept(pipe, 0)
    with concept_tokens(pipe, concept.embeddings) as tokens:
        ids = token_ids(pipe, [f"one {concept.name}"], tokens)["text_encoder"]
        assert ids.shape == (1, 4, 5)
        for i in range(4):
            assert ids[0, i, 2:4].tolist() == [
                tokens.ids["<a0>"]["text_encoder"][i],
                tokens.ids["<b0>"]["text_encoder"][i],
            ]
        assert tokens.expand("no concept") == ["no concept"] * 4 and tokens.expand("x<a0>")[3] == "x <new3>"
