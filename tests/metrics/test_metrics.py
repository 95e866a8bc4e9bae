"""Metrics of pictures against their packages and their formulas, on small models of random weights."""

from __future__ import annotations

import importlib
import json
import math
import sys
import types

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.metrics import (
    PROTOCOLS,
    ClipModel,
    ImageModel,
    InsightFaceModel,
    Result,
    Sample,
    clip_i,
    clip_t,
    compare,
    comparison_page,
    compositions,
    contact_sheet,
    dino,
    diversity,
    face_similarity,
    fid,
    hps,
    human_prompts,
    image_reward,
    kid,
    pick_score,
    read_samples,
)
from mole_kernels.metrics.distances import Inception
from mole_kernels.metrics.preference import ImageRewardModel

pytest.importorskip("transformers")
PROMPTS = ("a cat on a mat", "two dogs", "a red car")


def draw(folder, count, seed, subjects=False):
    """Pictures of noise over a colour, with metadata.jsonl."""
    folder.mkdir(parents=True)
    g, rows = torch.Generator().manual_seed(seed), []
    for i in range(count):
        base = torch.randint(0, 200, (1, 1, 3), generator=g)
        noise = torch.randint(0, 56, (40, 48, 3), generator=g)
        Image.fromarray((base + noise).to(torch.uint8).numpy()).save(folder / f"{i}.png")
        row = {"file_name": f"{i}.png", "text": PROMPTS[i % 3]}
        rows.append(row | ({"subject": f"s{i % 2}"} if subjects else {}))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def drawn(root):
    return draw(root / "drawn", 9, 0, subjects=True)


@pytest.fixture(scope="module")
def real(root):
    return draw(root / "real", 12, 1, subjects=True)


@pytest.fixture(scope="module")
def clip():
    return ClipModel.load("random")


@pytest.fixture(scope="module")
def vit():
    return ImageModel.load("random")


def cosine(a, b):
    return float((a @ b) / (a.norm() * b.norm()))


def by_the_model(clip, sample):
    """A picture's and its text's vectors, one at a time."""
    with torch.no_grad():
        pixels = clip.processor(images=sample.image(), return_tensors="pt")
        words = clip.processor(text=sample.text, return_tensors="pt")
        out = (
            clip.model.get_image_features(**pixels),
            clip.model.get_text_features(words["input_ids"], words["attention_mask"]),
        )
    return [part[0] if isinstance(part, torch.Tensor) else part.pooler_output[0] for part in out]


def test_clip_t_and_its_kin_are_cosines_with_the_prompts(drawn, clip):
    result = clip_t(drawn, clip)
    want = [cosine(*by_the_model(clip, sample)) for sample in drawn]
    assert result.by_picture == pytest.approx(want, abs=1e-5)
    assert result.value == pytest.approx(sum(want) / 9, abs=1e-5) and result.pictures == 9
    assert (result.model, result.revision) == ("CLIPModel of random weights", "seed 0")
    assert hps(drawn, clip).by_picture == result.by_picture
    scale = math.exp(float(clip.model.logit_scale.detach()))
    assert pick_score(drawn, clip).value == pytest.approx(scale * result.value, rel=1e-6)


def test_clip_t_is_torchmetrics_clip_score(drawn, clip, root):
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.multimodal.clip_score import clip_score

    clip.model.save_pretrained(root / "clip")
    clip.processor.save_pretrained(root / "clip")
    loaded = ClipModel.load(str(root / "clip"), device="cpu")
    result = clip_t(drawn, loaded)
    assert "clip" in result.model and result.revision.startswith("blake2b")
    pixels = [torch.tensor(list(s.image().tobytes())).view(40, 48, 3).permute(2, 0, 1) for s in drawn]
    theirs = []
    for pixel, sample in zip(pixels, drawn):
        try:
            score = clip_score(pixel.to(torch.uint8), sample.text, model_name_or_path=str(root / "clip"))
        except AttributeError as error:
            # torchmetrics 1.9 expects tensors where transformers 5 gives outputs
            pytest.skip(f"torchmetrics and transformers do not go together: {error}")
        theirs.append(float(score))
    ours = [100 * max(value, 0) for value in result.by_picture]
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_clip_i_and_dino_take_the_references_of_the_subject(drawn, real, clip, vit):
    for metric, model in ((clip_i, clip), (dino, vit)):
        result = metric(drawn, real, model)
        vectors = [model.images([s.image()])[0] for s in (*drawn, *real)]
        own, others = vectors[:9], vectors[9:]
        want = [sum(cosine(own[i], others[j]) for j in range(12) if j % 2 == i % 2) / 6 for i in range(9)]
        assert result.by_picture == pytest.approx(want, abs=1e-5)
    # references without subjects are everybody's
    plain = [Sample(s.path) for s in real]
    assert clip_i(drawn, plain, clip).value != pytest.approx(clip_i(drawn, real, clip).value, abs=1e-6)


def test_dino_is_the_first_token(drawn, vit, root):
    vit.model.save_pretrained(root / "vit")
    vit.processor.save_pretrained(root / "vit")
    loaded = ImageModel.load(str(root / "vit"), device="cpu")
    with torch.no_grad():
        want = vit.model(**vit.processor(images=drawn[0].image(), return_tensors="pt")).last_hidden_state[
            0, 0
        ]
    torch.testing.assert_close(loaded([drawn[0].image()])[0], want, atol=1e-5, rtol=1e-5)
    assert vit.num_features == 32


def test_diversity_is_zero_for_copies(drawn, vit):
    copies = [Sample(drawn[0].path, "x")] * 3
    assert diversity(copies, vit).value == pytest.approx(0, abs=1e-6)
    alone = [Sample(s.path, s.text) for s in drawn]
    vectors = vit.images([s.image() for s in alone])
    groups = [[i for i in range(9) if i % 3 == k] for k in range(3)]
    want = (
        sum(1 - sum(cosine(vectors[i], vectors[j]) for i in g for j in g if i != j) / 6 for g in groups) / 3
    )
    assert diversity(alone, vit).value == pytest.approx(want, abs=1e-5)


def test_fid_and_kid_are_torchmetrics_and_the_formula(drawn, real, vit):
    pytest.importorskip("torchmetrics")
    scipy = pytest.importorskip("scipy.linalg")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    result = fid(drawn, real, vit)
    theirs = FrechetInceptionDistance(feature=vit)
    kernel = KernelInceptionDistance(feature=vit, subset_size=9, subsets=100)
    for part, is_real in ((real, True), (drawn, False)):
        for sample in part:
            pixel = torch.tensor(list(sample.image().tobytes()), dtype=torch.uint8).view(40, 48, 3)
            theirs.update(pixel.permute(2, 0, 1)[None], real=is_real)
            kernel.update(pixel.permute(2, 0, 1)[None], real=is_real)
    assert result.value == pytest.approx(float(theirs.compute()), rel=1e-5)
    a, b = (vit([s.image() for s in part]).double() for part in (drawn, real))
    cov = [torch.cov(x.mT).numpy() for x in (a, b)]
    root_of = scipy.sqrtm(cov[0] @ cov[1]).real
    want = float((a.mean(0) - b.mean(0)).square().sum()) + (cov[0] + cov[1] - 2 * root_of).trace()
    assert result.value == pytest.approx(want, rel=2e-2)
    distance = kid(drawn, real, vit)
    torch.manual_seed(0)
    assert distance.value == pytest.approx(float(kernel.compute()[0]), rel=1e-5)
    assert kid(drawn, real, vit).value == distance.value and distance.details["subset"] == 9
    state = torch.get_rng_state()
    kid(drawn, real, vit)
    assert torch.equal(torch.get_rng_state(), state)
    for few in (drawn[:1], []):
        with pytest.raises(MoleValueError, match="at least 2 pictures on each side"):
            fid(few, real, vit)
    with pytest.raises(MoleValueError, match="at least 50"):
        kid(drawn, real, vit, subset=50)


def test_inception_is_torch_fidelitys(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    inception = pytest.importorskip("torch_fidelity.helpers")
    assert inception is not None
    (tmp_path / "wrong.pth").write_bytes(b"no weights")
    with pytest.raises(MoleFileError, match=r"wrong\.pth"):
        Inception(str(tmp_path / "wrong.pth"))
    with pytest.raises(MoleFileError, match="pt_inception-2015"):
        Inception(str(tmp_path / "none.pth"))
    assert fidelity.FeatureExtractorInceptionV3 is not None


class Faces:
    """The face is the picture's mean colour; green pictures have none."""

    name, revision = "faces", "1"

    def face(self, image):
        colour = torch.tensor(image.resize((1, 1)).getpixel((0, 0))).float()
        return None if colour[1] > colour[0] + colour[2] else colour / colour.norm()


def test_faces_are_compared_and_hidden_ones_count_nothing(tmp_path):
    def sample(name, colour, subject=""):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
        return Sample(tmp_path / f"{name}.png", "", subject)

    references = [
        sample("r0", (255, 0, 0), "a"),
        sample("r1", (0, 0, 255), "b"),
        sample("r2", (0, 255, 0), "a"),
    ]
    pictures = [
        sample("p0", (255, 0, 0), "a"),
        sample("p1", (255, 0, 255), "b"),
        sample("p2", (0, 255, 0), "a"),
    ]
    result = face_similarity(pictures, references, Faces())
    assert result.by_picture == pytest.approx((1.0, 0.5**0.5, 0.0), abs=1e-3)
    assert result.details["faces"] == pytest.approx(2 / 3)
    assert result.details["where_faces"] == pytest.approx((1 + 0.5**0.5) / 2, abs=1e-3)
    with pytest.raises(MoleValueError, match="none of its 1 references shows a face"):
        face_similarity(pictures, references[2:], Faces())
    with pytest.raises(MoleValueError, match=r"p1\.png.*subject among a, got b"):
        face_similarity(pictures[1:2], references[:1], Faces())
    with pytest.raises(MoleFileError, match="buffalo_l"):
        InsightFaceModel(str(tmp_path / "none"))


def test_image_reward_by_its_package(tmp_path, monkeypatch, drawn):
    with pytest.raises(MoleFileError, match=r"ImageReward\.pt and med_config\.json"):
        ImageRewardModel(str(tmp_path))
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(MoleStateError, match="pip install image-reward"):
        ImageRewardModel(str(tmp_path))
    package = types.ModuleType("ImageReward")
    package.load = lambda *_, **__: types.SimpleNamespace(score=lambda text, image: len(text) + image.width)
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    result = image_reward(drawn, ImageRewardModel(str(tmp_path)))
    assert result.by_picture[:3] == tuple(len(text) + 48.0 for text in PROMPTS)


def test_a_paired_bootstrap_knows_what_is_sure():
    g = torch.Generator().manual_seed(0)
    prompts = torch.randn(60, generator=g) * 5
    noise = torch.randn(60, generator=g) * 0.1

    def result(values, metric="m", better="higher"):
        return Result(metric, float(values.mean()), better, "model", "1", 60, tuple(values.tolist()))

    a, b = result(prompts + 0.1 + noise), result(prompts)
    found = compare(a, b)
    assert found.difference == pytest.approx(float((0.1 + noise).mean()), abs=1e-6) and found.sure
    assert found.low < found.difference < found.high and found.pairs == 60
    # the normal approximation of the mean's error
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * float(noise.std()) / 60**0.5, rel=0.15)
    assert found.wins == pytest.approx(float((0.1 + noise > 0).float().mean()))
    assert compare(b, b).wins == 0.5 and not compare(b, b).sure
    lower = compare(result(prompts - 1, better="lower"), result(prompts, better="lower"))
    assert lower.wins == 1.0 and lower.difference == pytest.approx(-1.0)
    assert compare(a, b) == compare(a, b)
    for other, match in (
        (result(prompts, "n"), "metric"),
        (Result("m", 0.0, "higher", "model", "2", 60, a.by_picture), "revision"),
        (Result("m", 0.0, "higher", "model", "1", 59, a.by_picture[:59]), "60 and 59"),
        (Result("m", 0.0, "higher", "model", "1", 60), "60 and 0"),
    ):
        with pytest.raises(MoleValueError, match=match):
            compare(a, other)


def test_protocols_say_what_is_drawn():
    difflora = PROTOCOLS["difflora"]
    assert len(difflora.prompts) == 30 == len(set(difflora.prompts)) and difflora.subjects == 25
    requests = list(difflora.requests([f"person {i}" for i in range(25)], seed=4))
    assert len(requests) == 750 == len(set(requests)) and {r.seed for r in requests} == {4}
    assert requests[0].text == "a photo of person 0"
    assert len(list(PROTOCOLS["selma"].requests(prompts=["a", "b"]))) == 2
    for wrong in ({}, {"prompts": ["a"], "subjects": ["b"]}):
        with pytest.raises(MoleValueError, match="protocol selma"):
            list(PROTOCOLS["selma"].requests(**wrong))
    with pytest.raises(MoleValueError, match=r"prompts with \{\}"):
        list(difflora.requests(["x"], ["no place"]))
    assert human_prompts(["A man rides", "humane snow", "two Girls", "a mantis"]) == [
        "A man rides",
        "two Girls",
    ]
    adapters = {"character": ["a", "b"], "style": ["c"], "object": ["d", "e"]}
    assert len(compositions(adapters, 2)) == 2 + 4 + 2 and len(compositions(adapters, 3)) == 4
    drawn = compositions(adapters, 2, 5, seed=1)
    assert len(set(drawn)) == 5 and drawn == compositions(adapters, 2, 5, seed=1)
    for size, count in ((4, None), (0, None), (3, 5)):
        with pytest.raises(MoleValueError, match="compositions"):
            compositions(adapters, size, count)


def test_what_cannot_be_measured_is_named(tmp_path, drawn, clip, vit):
    untold = [*drawn[:2], Sample(drawn[2].path)]
    with pytest.raises(MoleValueError, match=r"1 of 3 pictures have no prompt: 2\.png"):
        clip_t(untold, clip)
    with pytest.raises(MoleValueError, match="pictures and references"):
        clip_i(drawn, [], clip)
    with pytest.raises(MoleValueError, match="two pictures of one prompt"):
        diversity([Sample(s.path, str(i)) for i, s in enumerate(drawn)], vit)
    with pytest.raises(MoleTypeError, match="ClipModel"):
        ClipModel(vit.model, vit.processor)
    (tmp_path / "empty").mkdir()
    for load, files in ((ClipModel.load, "tokenizer"), (ImageModel.load, "preprocessor_config")):
        with pytest.raises(MoleFileError, match=files):
            load(str(tmp_path / "empty"))
    with pytest.raises(MoleFileError, match="neither"):
        read_samples(tmp_path / "empty")
    for line, match in (
        ("3", "file_name"),
        ('{"file_name": "../x"}', "in the folder"),
        ('{"file_name": "x.png"}', "no picture"),
    ):
        (tmp_path / "empty/metadata.jsonl").write_text(line)
        with pytest.raises(MoleFileError, match=match):
            read_samples(tmp_path / "empty")


def test_folders_without_metadata_name_subjects(tmp_path):
    for name in ("anna", "bert"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    assert [(s.path.name, s.subject) for s in read_samples(tmp_path)] == [
        ("0.png", ""),
        ("1.png", "anna"),
        ("1.png", "bert"),
    ]


def test_sheets_and_pages(drawn, real, clip):
    sheet = contact_sheet({"drawn": drawn, "real": real}, columns=4, side=20)
    assert sheet.size == (4 * 22 + 2, 2 * 36 + 2)
    a, b = clip_t(drawn, clip), clip_t(real[:9], clip)
    page = comparison_page(
        "<Title>", {"drawn": drawn, "real": real}, {"drawn": [a], "real": [b]}, {"real": [compare(a, b)]}
    )
    assert "&lt;Title&gt;" in page and "CLIP-T (higher is better)" in page and "data:image/png" in page
    assert "seed 0" in page and "Against real" in page
    with pytest.raises(MoleValueError, match="pictures"):
        contact_sheet({})
    with pytest.raises(MoleValueError, match="results of drawn"):
        comparison_page("t", {"drawn": drawn}, {"other": [a]})


def test_the_door_is_light():
    for name in importlib.import_module("mole_kernels.metrics").__all__:
        assert getattr(importlib.import_module("mole_kernels.metrics"), name) is not None
