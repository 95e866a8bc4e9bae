"""Concept tokens in text that nobody expands are refused; by regions they are expanded layer by layer."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import mole_kernels as mk
from mole_kernels.errors import MoleError, MoleFileError, MoleTypeError, MoleValueError
from mole_kernels.methods.mix_of_show.folder import save_dense
from mole_kernels.methods.mix_of_show.fusion import FusionSettings, fuse_pipeline
from mole_kernels.methods.mix_of_show.prompts import encode_prompts, sample_concepts
from mole_kernels.methods.mix_of_show.regions import Region
from mole_kernels.methods.mix_of_show.sampling import regional
from mole_kernels.methods.mix_of_show.tokens import add_concepts, concept_tokens, read_concepts
from tests.methods.concepts import random_concept
from tests.training.pipelines import sd_pipeline, sdxl_pipeline

PIPELINES = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}
OPTIONS = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "latent"}


def draw(pipe, prompts, tokens, **options):
    generator = torch.Generator().manual_seed(0)
    negative = "" if options.get("guidance_scale", 1.0) > 1 else None
    return sample_concepts(pipe, prompts, tokens, negative, generator=generator, **(OPTIONS | options)).images


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_plain_call_with_a_concept_token_is_an_error_that_says_what_to_do(kind):
    pipe = PIPELINES[kind]()
    concept, before = random_concept(pipe, 0), pipe.tokenizer
    with concept_tokens(pipe, concept.embeddings) as tokens:
        for prompt in ("three <a0> <b0>", "<A0>", ["three", "<b0>"]):
            with pytest.raises(MoleValueError, match=r"concept token <[ab]0>") as caught:
                pipe(prompt, **OPTIONS)
            assert "sample_concepts" in str(caught.value) and "regional" in str(caught.value)
        with pytest.raises(MoleValueError, match="<a0>"):
            pipe("three", negative_prompt="<a0>", guidance_scale=3.0, **OPTIONS)
        for call in (pipe.tokenizer.tokenize, pipe.tokenizer.encode, pipe.tokenizer):
            with pytest.raises(MoleValueError, match="<a0>"):
                call("<a0>")
            assert call("three")
        assert pipe("three", **OPTIONS).images.isfinite().all()
        assert draw(pipe, ["<a0> <b0>"], tokens).isfinite().all()
    assert pipe.tokenizer is before and pipe.tokenizer("<a0>")


def test_served_prompts_with_a_concept_token_are_refused():
    pipe = sd_pipeline()
    concept = random_concept(pipe, 0)
    with concept_tokens(pipe, concept.embeddings), mk.serve(pipe, {"x": concept.expert}) as server:
        with server.assign(["x"]), pytest.raises(MoleValueError, match="<a0>"):
            pipe(["<a0>"], **OPTIONS)
        with server.assign(["x"]):
            assert pipe(["three"], **OPTIONS).images.isfinite().all()


def test_more_concepts_are_guarded_beside_the_first():
    pipe = sd_pipeline()
    first, second = random_concept(pipe, 0), random_concept(pipe, 1)
    add_concepts(pipe, first.embeddings)
    with concept_tokens(pipe, second.embeddings):
        for word in ("<a0>", "<a1>"):
            with pytest.raises(MoleValueError, match=word):
                pipe.tokenizer(word)
    assert pipe.tokenizer("<a1>")
    with pytest.raises(MoleValueError, match="<a0>"):
        copy.deepcopy(pipe.tokenizer)("<a0>")


def test_a_guarded_tokenizer_is_saved_as_its_own_class(tmp_path):
    pipe = sd_pipeline()
    kind = type(pipe.tokenizer)
    add_concepts(pipe, random_concept(pipe, 0).embeddings)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["tokenizer"][1] == kind.__name__
    assert type(type(pipe).from_pretrained(tmp_path, local_files_only=True).tokenizer) is kind


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_regions_expand_tokens_for_every_layer(guidance):
    pipe = sd_pipeline()
    concepts = [random_concept(pipe, i) for i in range(2)]
    regions = [
        Region(concept.name, negative="three", box=(0, i / 2, 1, (i + 1) / 2))
        for i, concept in enumerate(concepts)
    ]
    with concept_tokens(pipe, concepts[0].embeddings | concepts[1].embeddings) as tokens:
        positive = encode_prompts(pipe, [r.prompt for r in regions], tokens).states[None]
        negative = encode_prompts(pipe, ["three", "three"], tokens).states[None]
        options = {"guidance_scale": guidance}
        with regional(pipe, regions, embeds=(positive, negative)):
            want = draw(pipe, ["five"], tokens, **options)
        with regional(pipe, regions, tokens=tokens):
            torch.testing.assert_close(draw(pipe, ["five"], tokens, **options), want)
        assert not torch.allclose(draw(pipe, ["five"], tokens, **options), want, atol=1e-3)
        before = dict(pipe.unet.attn_processors)
        with (
            pytest.raises(MoleValueError, match=r"regional\(pipe, regions, tokens=tokens\)"),
            regional(pipe, regions),
        ):
            pytest.fail("must not open")
        assert pipe.unet.attn_processors == before
        with pytest.raises(MoleValueError, match="tokens or embeds, got both"):
            regional(pipe, regions, tokens=tokens, embeds=(positive, negative))


def test_a_dense_pipeline_is_read_with_its_concepts(tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = sd_pipeline()
    concepts = [random_concept(pipe, i) for i in range(2)]
    settings = FusionSettings(
        templates=("{}",), words=0, runs=1, ridge=0.0, held_runs=0, steps=1, height=16, width=16
    )
    fused = fuse_pipeline(pipe, concepts, settings)
    save_dense(pipe, fused, tmp_path)
    dense = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    dense.set_progress_bar_config(disable=True)
    tokens = read_concepts(dense, tmp_path)
    assert set(tokens.names) == {"<a0>", "<b0>", "<a1>", "<b1>"} and tokens.layers == 4
    with pytest.raises(MoleValueError, match="<a1>"):
        dense("<a1> <b1>", **OPTIONS)
    assert draw(dense, ["<a1> <b1>"], tokens).isfinite().all()
    file, config = (
        tmp_path / "new_concept_cfg.json",
        json.loads((tmp_path / "new_concept_cfg.json").read_text()),
    )
    for change, error, match in (
        ({"<a0>": {"concept_token_names": ["<new0>"] * 4}}, MoleFileError, "concept_token_ids"),
        ({"<a0>": 3}, MoleFileError, "<a0>"),
        (
            {
                "<a0>": {
                    "concept_token_ids": [0] * 4,
                    "concept_token_names": config["<a0>"]["concept_token_names"],
                }
            },
            MoleValueError,
            "beside this file",
        ),
        (
            {"<a0>": {"concept_token_ids": [0], "concept_token_names": ["<new0>"]}},
            MoleValueError,
            "4 names",
        ),
    ):
        file.write_text(json.dumps(config | change))
        tokenizer = dense.tokenizer
        with pytest.raises(error, match=match):
            read_concepts(dense, file)
        assert dense.tokenizer is tokenizer
    with pytest.raises(MoleError):
        read_concepts(dense, tmp_path / "nowhere")


def adapter_pipeline(count):
    from diffusers import MultiAdapter, StableDiffusionAdapterPipeline, T2IAdapter

    pipe = sd_pipeline()
    torch.manual_seed(0)
    channels = list(pipe.unet.config.block_out_channels)
    adapters = [T2IAdapter(3, channels, 1, 2) for _ in range(count)]
    parts = {n: p for n, p in pipe.components.items() if n != "image_encoder"}
    adapter = MultiAdapter(adapters) if count > 1 else adapters[0]
    drawer = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    drawer.set_progress_bar_config(disable=True)
    return drawer


def test_sketch_and_pose_have_weights_of_their_own():
    pipe = adapter_pipeline(2)
    handed = []
    pipe.unet.register_forward_pre_hook(
        lambda m, a, k: handed.append([t.clone() for t in k["down_intrablock_additional_residuals"]]),
        with_kwargs=True,
    )

    def run(scales):
        handed.clear()
        g = torch.Generator().manual_seed(1)
        images = [torch.rand(1, 3, 16, 16, generator=g) for _ in range(2)]
        options = OPTIONS | {"adapter_conditioning_scale": scales, "guidance_scale": 1.0}
        pipe("three", image=images, generator=torch.Generator().manual_seed(0), **options)
        return handed[0]

    sketch, pose = run([1.0, 0.0]), run([0.0, 1.0])
    left, right = [((0.0, 0.0, 1.0, 0.5), 0.25)], [((0.0, 0.5, 1.0, 1.0), 3.0)]
    with regional(pipe, [Region("five")], adapter=[left, right], adapter_elsewhere=[2.0, 0.5]):
        both = run([1.0, 1.0])
    for out, a, b in zip(both, sketch, pose):
        half = a.shape[3] // 2
        torch.testing.assert_close(out[..., :half], 0.25 * a[..., :half] + 0.5 * b[..., :half])
        torch.testing.assert_close(out[..., half:], 2.0 * a[..., half:] + 3.0 * b[..., half:])
    for wrong, error in (([left], MoleValueError), ([left, right, left], MoleValueError), (left, MoleError)):
        with pytest.raises(error, match="adapter"):
            regional(pipe, [Region("five")], adapter=wrong)
    with pytest.raises(MoleTypeError, match="for each adapter"):
        regional(pipe, [Region("five")], adapter=[[3.0], left])
