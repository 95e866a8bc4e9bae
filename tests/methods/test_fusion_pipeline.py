"""Gradient fusion over whole pipelines: what is summed up where, one concept alone, memory, files, and bad
input.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleShapeError, MoleValueError
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.methods.mix_of_show.concept import (
    at_weights,
    load_concept,
    load_fusion_config,
    save_concept,
)
from mole_kernels.methods.mix_of_show.folder import load_fused, save_dense, save_fused
from mole_kernels.methods.mix_of_show.fusion import (
    FusionSettings,
    fuse_by_weights,
    fuse_pipeline,
    plan_fusion,
    put_into_weights,
)
from mole_kernels.methods.mix_of_show.fusion_check import noise_errors
from mole_kernels.methods.mix_of_show.prompts import encode_prompts, sample_concepts
from mole_kernels.methods.mix_of_show.tokens import add_concepts, concept_tokens, cross_attentions
from mole_kernels.patching.apply import patch
from tests.methods.concepts import random_concept
from tests.training.pipelines import sd_pipeline, sdxl_pipeline

SETTINGS = FusionSettings(
    templates=("{}", "{} three"), words=0, runs=1, held_runs=0, ridge=0.0, steps=2, height=16, width=16
)
PIPELINES = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}


def draw(pipe, concept, tokens):
    options = {
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return sample_concepts(pipe, [concept.name], tokens, None, **options).images


@pytest.fixture(scope="module")
def two():
    pipe = sd_pipeline()
    concepts = [
        random_concept(pipe, 0, text_encoder_alpha=0.5),
        random_concept(pipe, 1, rank=3, unet_alpha=0.8),
    ]
    return pipe, concepts, fuse_pipeline(pipe, concepts, SETTINGS)


@pytest.mark.parametrize("kind", PIPELINES)
def test_one_concept_fused_draws_what_it_draws_alone(kind):
    pipe = PIPELINES[kind]()
    concept = random_concept(pipe, 0, unet_alpha=0.7)
    fused = fuse_pipeline(pipe, [concept], SETTINGS)
    with concept_tokens(pipe, concept.embeddings) as tokens:
        base = draw(pipe, concept, tokens)
        with patch(pipe, {"x": concept.expert}, scales={"x": 1.0}) as handle:
            # the alphas differ by component, so set them through the factors
            handle.swap(
                "x", Expert({p: replace(f, scale=concept.alpha(p)) for p, f in concept.expert.layers.items()})
            )
            alone = draw(pipe, concept, tokens)
            states = encode_prompts(pipe, [concept.name], tokens).states
        with patch(pipe, {"x": fused.expert}, allow_large_rank=True):
            # every place up to the end token; what comes after it no layer has been asked about
            torch.testing.assert_close(
                encode_prompts(pipe, [concept.name], tokens).states[:, :, :4],
                states[:, :, :4],
                rtol=1e-3,
                atol=1e-4,
            )
            together = draw(pipe, concept, tokens)
    assert (alone - base).norm() > 0.02 * base.norm()
    # the padding's text states are not among what K and V were fused for, and they count a little
    assert (together - alone).norm() < 0.5 * (alone - base).norm()


def test_alpha_zero_is_the_base_model():
    pipe = sd_pipeline()
    concepts = [random_concept(pipe, i, unet_alpha=0.0, text_encoder_alpha=0.0) for i in range(2)]
    fused = fuse_pipeline(pipe, concepts, SETTINGS)
    assert all(layer.delta().abs().max() == 0 for layer in fused.expert.layers.values())
    assert all(row.base == 0 and row.fused == 0 for row in fused.layers)


def by_hand(pipe, concepts, path):
    """Inputs [K,rows] and wanted changes [N,rows] of one layer, from copies of the pipeline with merged
    weights and stored inputs.
    """
    inputs, wanted = [], []
    with concept_tokens(pipe, {t: e for c in concepts for t, e in c.embeddings.items()}) as tokens:
        text = fuse_pipeline_text(pipe, concepts)
        for concept in concepts:
            own = copy.deepcopy(pipe)
            scaled = {p: replace(f, scale=concept.alpha(p)) for p, f in concept.expert.layers.items()}
            in_text = path.startswith("text_encoder")
            kept = {p: f for p, f in scaled.items() if p.startswith("text_encoder") == in_text}
            put_into_weights(own, Expert(kept if in_text else text | kept))
            seen = []
            module = own.components[path.split(".")[0]].get_submodule(path.split(".", 1)[1])
            hook = module.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
            if in_text:
                for t in SETTINGS.templates:
                    for variant in tokens.expand(t.replace("{}", concept.name)):
                        ids = own.tokenizer([variant])["input_ids"]
                        own.text_encoder(torch.tensor(ids))
            else:
                draw(own, concept, tokens)
            hook.remove()
            x = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen]).double().mT
            inputs.append(x)
            wanted.append(scaled[path].delta(torch.float64) @ x)
    return torch.cat(inputs, 1), torch.cat(wanted, 1)


def fuse_pipeline_text(pipe, concepts):
    """The fused text encoder's factors alone."""
    plain = sd_pipeline()
    made = fuse_pipeline(plain, concepts, SETTINGS).expert.layers
    return {p: f for p, f in made.items() if p.startswith("text_encoder")}


@pytest.mark.parametrize(
    "path",
    [
        "text_encoder.encoder.layers.1.self_attn.out_proj",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ],
    ids=["text", "unet"],
)
def test_a_layer_is_the_least_squares_solution_over_inputs_gathered_by_hand(two, path):
    _, concepts, fused = two
    X, Y = by_hand(sd_pipeline(), concepts, path)
    want = Y @ torch.linalg.pinv(X, rcond=1e-6)
    found = fused.expert.layers[path.replace("text_encoder.", "text_encoder.text_model.")]
    row = next(r for r in fused.layers if r.path == path)
    residual = (Y - want @ X).square().sum().item()
    assert row.fused == pytest.approx(residual, rel=1e-2)
    assert ((found.delta(torch.float64) - want) @ X).norm() < 1e-2 * Y.norm()
    assert row.base == pytest.approx(Y.square().sum().item(), rel=1e-3)
    assert sum(row.rows.values()) == X.shape[1]


def test_keys_and_values_see_concept_and_end_tokens_of_their_own_layer(two):
    pipe, concepts, fused = two
    rows = [r for r in fused.layers if r.group == "cross-attention"]
    # two templates of two concept tokens and an end token
    assert len(rows) == 8 and all(r.rows == {c.name: 6 for c in concepts} for r in rows)
    text = {p: f for p, f in fused.expert.layers.items() if p.startswith("text_encoder")}
    with concept_tokens(pipe, fused.embeddings) as tokens, patch(pipe, {"text": Expert(text)}):
        states = {c.name: encode_prompts(pipe, [c.name], tokens).states[0] for c in concepts}
    for i, path in enumerate(cross_attentions(pipe.unet)):
        key = f"unet.{path}.to_v"
        for concept in concepts:
            x = states[concept.name][i, 1:4].double()
            want = x @ concept.expert.layers[key].delta(torch.float64).mT * concept.unet_alpha
            torch.testing.assert_close(
                x @ fused.expert.layers[key].delta(torch.float64).mT, want, rtol=1e-3, atol=1e-4
            )


def test_no_layer_is_worse_than_weight_fusion_and_ranks_add_up(two):
    _, concepts, fused = two
    assert len(fused.layers) == len(fused.expert.layers) == 40
    for row in fused.layers:
        assert (
            row.fused <= row.by_weights * (1 + 1e-9)
            and row.rank == 5
            and row.directions <= row.K
            and row.condition >= 1
        )
    totals = fused.totals()
    assert totals["cross-attention"]["fused"] < 1e-9 * totals["cross-attention"]["base"]
    averaged = fuse_by_weights(concepts)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    want = sum(c.expert.layers[key].delta() * c.alpha(key) / 2 for c in concepts)
    torch.testing.assert_close(averaged.layers[key].delta(), want)


def test_less_memory_means_more_passes_and_the_same_result(two):
    pipe, concepts, fused = two
    largest = max(site.bytes for site in plan_fusion(pipe, concepts, SETTINGS).sites)
    said = []
    settings = replace(SETTINGS, memory=4 * largest)
    again = fuse_pipeline(pipe, concepts, settings, lambda *what: said.append(what))
    made = plan_fusion(pipe, concepts, settings)
    assert made.bytes <= 4 * largest < plan_fusion(pipe, concepts, SETTINGS).bytes and len(made.unet) > 1
    assert (
        said[0][0] == str(made) and f"{len(made.unet)} x 2 = {2 * len(made.unet)} sampling runs" in said[0][0]
    )
    for path, layer in fused.expert.layers.items():
        torch.testing.assert_close(again.expert.layers[path].delta(), layer.delta(), rtol=1e-4, atol=1e-6)
    with pytest.raises(MoleValueError, match="at least"):
        fuse_pipeline(pipe, concepts, replace(SETTINGS, memory=largest - 1))


def test_a_layer_that_only_one_concept_has_is_kept_from_the_other():
    pipe = sd_pipeline()
    first, second = random_concept(pipe, 0), random_concept(pipe, 1)
    key = next(p for p in second.expert.layers if p.endswith("attn2.to_k"))
    second = replace(second, expert=Expert({p: f for p, f in second.expert.layers.items() if p != key}))
    fused = fuse_pipeline(pipe, [first, second], SETTINGS)
    row = next(r for r in fused.layers if r.path == key)
    # twelve inputs in K = 12: both wishes can be met
    assert set(row.rows) == {first.name, second.name} and row.rank == 2 and row.base > 0
    assert row.fused <= row.by_weights


def test_the_folder_and_the_dense_pipeline_draw_the_same(two, tmp_path):
    from diffusers import StableDiffusionPipeline

    _, concepts, fused = two
    save_fused(fused, tmp_path / "fused", "kohya")
    report = json.loads((tmp_path / "fused/report.json").read_text())
    assert len(report["layers"]) == 40 and report["layers"][0].keys() >= {
        "base",
        "by_weights",
        "fused",
        "directions",
        "condition",
    }
    config = json.loads((tmp_path / "fused/new_concept_cfg.json").read_text())
    names = config["<b0>"]["concept_token_names"]
    assert len(names) == 4 and names[0] == "<new4>" and len(config["<b0>"]["concept_token_ids"]) == 4
    one = sd_pipeline()
    expert, tokens = load_fused(one, tmp_path / "fused")
    with patch(one, {"fused": expert}, allow_large_rank=True):
        want = draw(one, concepts[1], tokens)
    save_dense(sd_pipeline(), fused, tmp_path / "dense")
    dense = StableDiffusionPipeline.from_pretrained(tmp_path / "dense", local_files_only=True)
    dense.set_progress_bar_config(disable=True)
    assert json.loads((tmp_path / "dense/new_concept_cfg.json").read_text()) == config
    assert dense.tokenizer.convert_tokens_to_ids("<new4>") == config["<b0>"]["concept_token_ids"][0]
    torch.testing.assert_close(draw(dense, concepts[1], tokens), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ending", ["main.pth", "research.pth", "safetensors"])
def test_concepts_and_the_papers_configuration_are_read(ending, tmp_path):
    pipe = sd_pipeline()
    concept = random_concept(pipe, 0)
    save_concept(concept, tmp_path / f"a.{ending}", "research" if "research" in ending else "main")
    entry = {
        "lora_path": f"a.{ending}",
        "unet_alpha": 0.8,
        "text_encoder_alpha": 1,
        "concept_name": concept.name,
    }
    (tmp_path / "config.json").write_text(json.dumps([entry]))
    (found,) = load_fusion_config(tmp_path / "config.json")
    assert (found.name, found.unet_alpha, found.text_encoder_alpha) == (concept.name, 0.8, 1.0)
    assert len(found.expert.layers) == len(concept.expert.layers)
    want = fuse_by_weights([replace(concept, unet_alpha=0.8)])
    with (
        concept_tokens(pipe, found.embeddings) as tokens,
        patch(pipe, {"x": fuse_by_weights([found])}) as handle,
    ):
        made = draw(pipe, found, tokens)
        handle.swap("x", want)
        torch.testing.assert_close(draw(pipe, concept, tokens), made)


def test_bad_configurations_name_entry_and_field(tmp_path):
    path = tmp_path / "c.json"
    concept = random_concept(sd_pipeline(), 0)
    save_concept(concept, tmp_path / "a.pth")
    for text, error, match in (
        ("[{", MoleFileError, "line 1"),
        ("{}", MoleFileError, "a list"),
        ("[1]", MoleFileError, "entry 0"),
        ('[{"lora_path": "a.pth", "alpha": 1}]', MoleFileError, "got alpha"),
        ('[{"lora_path": "b.pth"}]', MoleFileError, "no such file"),
        ('[{"lora_path": "a.pth", "concept_name": "<a0> <c0>"}]', MoleValueError, "concept_name.*<a0>, <b0>"),
        ('[{"lora_path": "a.pth", "unet_alpha": NaN}]', MoleFileError, "NaN is not JSON"),
        ('[{"lora_path": "a.pth", "unet_alpha": 1e999}]', MoleValueError, "unet_alpha.*finite"),
        ('[{"lora_path": "a.pth", "unet_alpha": "1"}]', TypeError, "unet_alpha"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=match):
            load_fusion_config(path)
    assert load_concept(tmp_path / "a.pth").name == concept.name


def test_bad_concepts_are_refused_by_name_and_change_nothing():
    pipe = sd_pipeline()
    first, second = random_concept(pipe, 0), random_concept(pipe, 1)
    before, tokenizer = pipe.text_encoder.get_input_embeddings().weight, pipe.tokenizer
    other = {p: LowRank(torch.ones(2, f.in_features + 1), f.up) for p, f in second.expert.layers.items()}
    word = {"three": second.embeddings["<a1>"], "<b1>": second.embeddings["<b1>"]}
    short = {token: {name: v[:3] for name, v in found.items()} for token, found in second.embeddings.items()}
    nan = {p: replace(f, down=f.down * float("nan")) for p, f in second.expert.layers.items()}
    for bad, settings, error, match in (
        (replace(second, expert=Expert(other)), SETTINGS, MoleShapeError, r"<a1> <b1>.*expected down"),
        (
            replace(second, expert=Expert({"unet.nowhere": LowRank(torch.ones(1, 2), torch.ones(2, 1))})),
            SETTINGS,
            MoleKeyError,
            "<a1>",
        ),
        (
            replace(second, name="three <b1>", embeddings=word),
            SETTINGS,
            MoleValueError,
            "'three'.*already has",
        ),
        (replace(first), SETTINGS, MoleValueError, "'<a0>'.*collides"),
        (replace(second, embeddings=short), SETTINGS, MoleShapeError, r"'<a1>'.*expected \[4,12\]"),
        (second, replace(SETTINGS, templates=("three three {}",)), MoleValueError, "cuts <b"),
        (replace(second, expert=Expert(nan)), SETTINGS, MoleValueError, "NaN"),
        (replace(second, name="<a1>"), SETTINGS, MoleValueError, "all of its tokens"),
    ):
        with pytest.raises(error, match=match):
            fuse_pipeline(pipe, [first, bad], settings)
        assert pipe.text_encoder.get_input_embeddings().weight is before and pipe.tokenizer is tokenizer
    assert not any("experts" in m.__dict__.get("_modules", {}) for m in pipe.unet.modules())
    with pytest.raises(MoleValueError, match="at least one concept"):
        fuse_pipeline(pipe, [], SETTINGS)
    add_concepts(pipe, first.embeddings)
    # the pipeline's own <new0> … are not taken twice
    assert add_concepts(pipe, second.embeddings).names["<a1>"][0] == "<new8>"


def test_text_encoders_of_sdxl_are_fused_both():
    pipe = sdxl_pipeline()
    fused = fuse_pipeline(pipe, [random_concept(pipe, i) for i in range(2)], SETTINGS)
    components = {row.path.split(".")[0] for row in fused.layers}
    assert components == {"text_encoder", "text_encoder_2", "unet"}
    # 16 layers of text encoders, 8 of K and V, 24 others
    assert len(fused.layers) == 48 and all(row.base > 0 for row in fused.layers)
    assert all(row.fused <= row.by_weights * (1 + 1e-9) for row in fused.layers)


def test_what_is_fitted_chosen_and_judged_shares_no_seed_and_no_text():
    lots = FusionSettings(runs=3, choose_runs=2, held_runs=4).lots
    assert [lot.name for lot in lots] == ["fit", "choose", "held"]
    assert [len(lot.runs) for lot in lots] == [3, 2, 4]
    seeds = [{seed for _, seed in lot.runs} for lot in lots]
    texts = [set(lot.templates) for lot in lots]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not seeds[i] & seeds[j] and not texts[i] & texts[j]
    # the caller's own prompts alone: other seeds, and no choice where text is all that a layer sees
    own = FusionSettings(templates=("{}",), words=0).lots
    assert [lot.texts for lot in own] == [("{}",), (), ()]
    assert FusionSettings(ridge=0.0, held_runs=0).lots[0].name == "fit"


@pytest.mark.parametrize("in_place", [False, True], ids=["own K and V", "fused K and V"])
def test_the_default_chooses_and_reports_what_was_held_out(in_place):
    pipe = sd_pipeline()
    concepts = [random_concept(pipe, i) for i in range(2)]
    settings = FusionSettings(
        templates=("{}", "{} three"),
        words=8,
        choose_templates=("three {}",),
        held_templates=("{} {}",),
        runs=2,
        choose_runs=1,
        held_runs=1,
        steps=2,
        height=16,
        width=16,
        fused_text_layers=in_place,
        lbfgs=3,
    )
    fused = fuse_pipeline(pipe, concepts, settings)
    for row in fused.layers:
        assert set(row.held) == {"base", "by_weights", "gradient", "fused", "lbfgs"}
        assert row.gradient <= row.fused * (1 + 1e-9) and (row.ridge is None) == (
            row.note == "weight fusion, which is better on other inputs"
        )
    # the random words have gone
    assert set(fused.tokens.names) == set(fused.embeddings) == {"<a0>", "<b0>", "<a1>", "<b1>"}
    row = next(row for row in fused.layers if row.group == "cross-attention")
    # ten texts of two concept tokens and an end token
    assert row.rows == {c.name: 30 for c in concepts}
    totals = fused.totals()
    for group in ("text encoder", "cross-attention", "unet"):
        assert totals[group]["held_fused"] <= 1.05 * totals[group]["held_by_weights"]
    with concept_tokens(pipe, fused.embeddings) as tokens:
        errors = noise_errors(
            pipe,
            concepts,
            {"weights": fuse_by_weights(concepts), "fused": fused.expert, "first": at_weights(concepts[0])},
            tokens,
            ["{} {}"],
            [77],
            num_inference_steps=2,
            height=16,
            width=16,
        )
        assert errors["first"][concepts[0].name] < 1e-9 < errors["first"][concepts[1].name]
        assert all(errors[way][c.name] > 0 for way in ("weights", "fused") for c in concepts)
        with pytest.raises(MoleValueError, match="templates with"):
            noise_errors(pipe, concepts, {}, tokens, ["no place"], [1])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"runs": 0}, "runs"),
        ({"choose_runs": -1}, "choose_runs"),
        ({"held_templates": ("none",)}, "templates"),
        ({"templates": ("{}",), "held_templates": ("{}",)}, "fitted and held out"),
        ({"lbfgs": -1}, "lbfgs"),
        ({"ridge": -0.5}, "ridge"),
    ],
)
def test_settings_that_make_no_fusion_are_named(wrong, match):
    with pytest.raises(MoleValueError, match=match):
        FusionSettings(**wrong)


def test_sdxl_predicts_noise_with_its_pooled_text():
    pipe = sdxl_pipeline()
    concept = random_concept(pipe, 0)
    with concept_tokens(pipe, concept.embeddings) as tokens:
        errors = noise_errors(
            pipe,
            [concept],
            {"own": at_weights(concept)},
            tokens,
            ["{}"],
            [1],
            num_inference_steps=1,
            height=16,
            width=16,
        )
    assert errors["own"][concept.name] < 1e-9
