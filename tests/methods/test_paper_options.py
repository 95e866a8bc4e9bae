"""Mix-of-Show's options files: read in the form of its code, used by the commands, and named where wrong."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mole_kernels.cli.app import app
from mole_kernels.errors import MoleFileError, MoleValueError
from mole_kernels.methods.mix_of_show.augment import TEMPLATES
from mole_kernels.methods.mix_of_show.concept import load_concept
from mole_kernels.methods.mix_of_show.folder import save_fused
from mole_kernels.methods.mix_of_show.fusion import FusionSettings, fuse_pipeline
from mole_kernels.methods.mix_of_show.paper_options import ValidationOptions, read_paper_options
from tests.methods.concepts import random_concept
from tests.training.pipelines import sd_pipeline

# the form of the paper's files: flow mappings, !!float, ~, comments
TRAIN = """name: 0001_EDLoRA_three_B2
manual_seed: 7
mixed_precision: fp16
gradient_accumulation_steps: 1

datasets:
  train:
    name: LoraDataset
    concept_list: data/three.json
    use_caption: true
    use_mask: true
    instance_transform:
      - { type: HumanResizeCropFinalV3, size: 16, crop_p: 0.5 }
      - { type: ToTensor }
      - { type: Normalize, mean: [ 0.5 ], std: [ 0.5 ] }
      - { type: ShuffleCaption, keep_token_num: 1 }
    replace_mapping:
      <TOK>: <v1> <v2>
    batch_size_per_gpu: 2
    dataset_enlarge_ratio: 3

  val_vis:
    name: PromptDataset
    prompts: data/prompts.txt
    num_samples_per_prompt: 2
    latent_size: [ 4,64,64 ]
    replace_mapping:
      <TOK>: <v1> <v2>
    batch_size_per_gpu: 4

models:
  pretrained_path: model
  enable_edlora: true  # true means ED-LoRA, false means vallina LoRA
  finetune_cfg:
    text_embedding:
      enable_tuning: true
      lr: !!float 1e-3
    text_encoder:
      enable_tuning: true
      lora_cfg:
        rank: 4
        alpha: 1.0
        where: CLIPAttention
      lr: !!float 1e-5
    unet:
      enable_tuning: true
      lora_cfg:
        rank: 4
        alpha: 1.0
        where: Attention
      lr: !!float 1e-4
  new_concept_token: <v1>+<v2>
  initializer_token: <rand-0.013>+three
  noise_offset: 0.01
  attn_reg_weight: 0.01
  reg_full_identity: false
  use_mask_loss: true
  gradient_checkpoint: false
  enable_xformers: true

path:
  pretrain_network: ~

train:
  optim_g:
    type: AdamW
    lr: !!float 0.0 # no use since we define different component lr in model
    weight_decay: 0.01
    betas: [ 0.9, 0.999 ] # align with taming
  unet_kv_drop_rate: 0
  scheduler: linear
  emb_norm_threshold: !!float 5.5e-1

val:
  val_during_save: true
  compose_visualize: true
  alpha_list: [0, 0.7, 1.0]
  sample:
    num_inference_steps: 2
    guidance_scale: 7.5

logger:
  print_freq: 10
  save_checkpoint_freq: !!float 10000
"""
SAMPLE = """name: 0001
manual_seed: 0
datasets:
  val_vis:
    prompts: [ "one <TOK>", "  <TOK>   two " ]
    num_samples_per_prompt: 3
    replace_mapping:
      <TOK>: <v1> <v2>
models:
  pretrained_path: model
  enable_edlora: true
path:
  lora_path: experiments/models/edlora_model-latest.pth
val:
  alpha_list: [0, 1.0]
  sample:
    num_inference_steps: 3
    guidance_scale: 2
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository as the paper's: options/train/…, data/…, and a model."""
    root = tmp_path_factory.mktemp("repository")
    sd_pipeline().save_pretrained(root / "model")
    (root / "options/train").mkdir(parents=True)
    (root / "options/train/three.yml").write_text(TRAIN)
    for part in ("image", "caption", "mask"):
        (root / "data" / part).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (20, 24 + i), (50 * i, 90, 120)).save(root / f"data/image/{i}.jpg")
        mask = Image.new("L", (20, 24 + i), 0)
        mask.paste(255, (0, 0, 10, 12))
        mask.save(root / f"data/mask/{i}.png")
        if i:
            (root / f"data/caption/{i}.txt").write_text(f"<TOK>,  {['one', 'two'][i - 1]}\nnot this\n")
    (root / "data/image/.DS_Store").write_bytes(b"x")
    entry = {
        "instance_prompt": "<TOK>",
        "instance_data_dir": "data/image",
        "caption_dir": "data/caption",
        "mask_dir": "data/mask",
    }
    (root / "data/three.json").write_text(json.dumps([entry]))
    (root / "data/prompts.txt").write_text("a <TOK>\n\nthree  <TOK>\n")
    return root


def test_a_training_file_says_what_the_papers_code_would_do(root):
    options = read_paper_options(root / "options/train/three.yml")
    assert options.tokens == {"<v1>": "<rand-0.013>", "<v2>": "three"} and options.model == "model"
    training = options.training
    # three pictures, three times, in twos
    assert (training.config.steps, training.config.lr, training.config.seed) == (5, 1e-4, 7)
    assert training.config.schedule == "linear" and training.config.checkpoint_every == 10000
    assert (training.embedding_lr, training.text_encoder_lr, training.rank) == (1e-3, 1e-5, 4)
    assert (training.masked, training.attention, training.full_identity) == (True, 0.01, False)
    assert training.norm_limit == 0.55 and training.noise_offset == 0.01
    assert [(p.path.name, p.caption, p.mask.name) for p in options.pictures] == [
        ("0.jpg", "<v1> <v2>", "0.png"),
        ("1.jpg", "<v1> <v2>, one", "1.png"),
        ("2.jpg", "<v1> <v2>, two", "2.png"),
    ]
    made = options.augmentation
    assert (made.kind, made.size, made.crop, made.shuffle_after, made.templates) == ("person", 16, 0.5, 1, ())
    assert options.validation == ValidationOptions(
        ("a <v1> <v2>", "three <v1> <v2>"), (0.0, 0.7, 1.0), 2, 2, 7.5
    )
    assert (
        read_paper_options(
            root / "options/train/three.yml", mixed_precision=True
        ).training.config.mixed_precision
        == "fp16"
    )


def test_transforms_for_objects_and_texts_are_known(root, tmp_path):
    text = TRAIN.replace(
        "      - { type: HumanResizeCropFinalV3, size: 16, crop_p: 0.5 }\n",
        "      - { type: ResizeFillMaskNew, size: 32, crop_p: 0.25, scale_ratio: [ 0.5, 1 ] }\n"
        "      - { type: PairRandomHorizontalFlip }\n"
        "      - { type: EnhanceText, enhance_type: human }\n",
    )
    path = root / "options/train/object.yml"
    path.write_text(text)
    made = read_paper_options(path).augmentation
    assert (made.kind, made.size, made.crop, made.scale, made.flip) == ("object", 32, 0.25, (0.5, 1.0), 0.5)
    assert made.templates == TEMPLATES["person"]


def test_a_file_for_sampling_has_prompts_and_a_concept(tmp_path):
    (tmp_path / "sample.yml").write_text(SAMPLE)
    options = read_paper_options(tmp_path / "sample.yml")
    assert options.training is None and options.concept.name == "edlora_model-latest.pth"
    assert options.validation == ValidationOptions(("one <v1> <v2>", "<v1> <v2> two"), (0.0, 1.0), 3, 3, 2.0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (("name: 0001_EDLoRA_three_B2", "name: [1"), MoleFileError, "no YAML"),
        (("enable_edlora: true", "enable_edlora: false"), MoleValueError, "train_expert"),
        (("where: CLIPAttention", "where: CLIPEncoderLayer"), MoleValueError, "text_encoder.*CLIPAttention"),
        (("where: Attention", "where: Transformer2DModel"), MoleValueError, "unet.*where"),
        (("rank: 4", "rank: four"), MoleFileError, "rank.*int"),
        (("type: AdamW", "type: Adam"), MoleValueError, "AdamW"),
        (("HumanResizeCropFinalV3", "Rotate"), MoleValueError, r"instance_transform\[0\]"),
        (("crop_p: 0.5", "crop: 0.5"), MoleValueError, r"instance_transform\[0\]"),
        (("data/three.json", "data/four.json"), MoleFileError, r"concept_list.*four\.json"),
        (("+three", ""), MoleFileError, "initializer_token.*2 starts"),
        (("alpha_list: [0, 0.7, 1.0]", "alpha_list: [all]"), MoleFileError, "alpha_list"),
        (("batch_size_per_gpu: 2", "batch_size_per_gpu: true"), MoleFileError, "batch_size_per_gpu.*int"),
        (("!!float 1e-4", "!!python/object/apply:os.system [ls]"), MoleFileError, "no YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(root, change, error, match):
    assert change[0] in TRAIN
    path = root / "options/train/wrong.yml"
    path.write_text(TRAIN.replace(*change))
    with pytest.raises(error, match=match):
        read_paper_options(path)


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_train_sample_and_draw_by_regions_from_the_shell(root, tmp_path):
    options, model = root / "options/train/three.yml", root / "model"
    out = tmp_path / "v.pth"
    result = call("train", "mix-of-show", options, "--out", out, "--model", model, "--dry-run")
    assert result.exit_code == 0 and "nothing trained" in result.output and not out.exists()
    result = call("train", "mix-of-show", options, "--out", out, "--model", model, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert load_concept(out).name == "<v1> <v2>"
    arguments = ("--model", model, "--resolution", 16, "--sampling-steps", 1)
    drawn = tmp_path / "drawn"
    result = call("mix-of-show", "sample", out, "--options", options, "--out", drawn, *arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (drawn / "metadata.jsonl").read_text().splitlines()]
    # two prompts, three alphas, two samples
    assert len(rows) == 12 and {row["alpha"] for row in rows} == {0.0, 0.7, 1.0}
    images = {row["file_name"]: Image.open(drawn / row["file_name"]).tobytes() for row in rows}
    assert len(images) == 12 and images["alpha_0-prompt_000-000.png"] != images["alpha_0-prompt_000-001.png"]
    result = call(
        "mix-of-show", "sample", out, "--prompt", "one <TOK>", "--alphas", "0,1", "--out", drawn, *arguments
    )
    assert result.exit_code == 0 and len((drawn / "metadata.jsonl").read_text().splitlines()) == 2
    regions = "[one <TOK>]-*-[two]-*-[0, 0, 16, 8]|"
    result = call(
        "mix-of-show", "regions", out, "--prompt", "three", "--regions", regions, "--out", drawn, *arguments
    )
    assert result.exit_code == 0 and (drawn / "regions-000.png").exists()


def test_a_fused_folder_is_drawn_too(root, tmp_path):
    pipe = sd_pipeline()
    settings = FusionSettings(
        templates=("{}",), words=0, runs=1, ridge=0.0, held_runs=0, steps=1, height=16, width=16
    )
    save_fused(fuse_pipeline(pipe, [random_concept(pipe, i) for i in range(2)], settings), tmp_path / "fused")
    (tmp_path / "regions.json").write_text(
        json.dumps([{"prompt": "<a0> <b0>", "box": [0, 0, 1, 0.5]}, {"prompt": "<a1> <b1>"}])
    )
    result = call(
        "mix-of-show",
        "regions",
        tmp_path / "fused",
        "--prompt",
        "one",
        "--regions",
        tmp_path / "regions.json",
        "--out",
        tmp_path / "out",
        "--model",
        root / "model",
        "--resolution",
        16,
        "--sampling-steps",
        1,
        "--samples",
        2,
    )
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("sample",), "--prompt"),
        (("sample", "--prompt", "x", "--alphas", "1,a"), "--alphas"),
        (("regions", "--prompt", "x", "--regions", "[a]-*-[b]"), "three fields"),
        (("regions", "--prompt", "x", "--regions", "nowhere.json"), "nowhere"),
    ],
)
def test_bad_requests_are_named_before_a_model_is_read(tmp_path, more, match):
    torch.manual_seed(0)
    from mole_kernels.methods.mix_of_show.concept import save_concept

    save_concept(random_concept(sd_pipeline(), 0), tmp_path / "a.pth")
    name, *rest = more
    result = call("mix-of-show", name, tmp_path / "a.pth", "--model", "none", "--out", tmp_path / "x", *rest)
    assert result.exit_code != 0 and match in str(result.exception) and not (tmp_path / "x").exists()
