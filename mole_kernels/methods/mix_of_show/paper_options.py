"""The options files of Mix-of-Show's code (YAML): what they train, on what, and how they validate it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, printable
from mole_kernels.files.opening import PathLike
from mole_kernels.files.text import read_json_file, read_text, text_lines
from mole_kernels.methods.mix_of_show.augment import TEMPLATES, Augmentation
from mole_kernels.methods.mix_of_show.augmented import ConceptPicture
from mole_kernels.methods.mix_of_show.edlora import EDLoRATraining
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.pictures import SUFFIXES

# what its text transforms are called -> our templates
_TEXTS = {"human": "person", "object": "object", "style": "style"}
_KINDS = {"HumanResizeCropFinalV3": "person", "ResizeFillMaskNew": "object"}
# transforms that say nothing here: pixels are always scaled to -1..1
_PLAIN = ("ToTensor", "Normalize")


@dataclass(frozen=True)
class ValidationOptions:
    """Pictures that show how far a concept has come.

    Args:
        prompts: With the concept's tokens in them.
        alphas: Of the expert; 0 draws by the embeddings alone.
        samples: Pictures of each prompt; picture n has the same noise for all prompts.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
    """

    prompts: tuple[str, ...] = ()
    alphas: tuple[float, ...] = (1.0,)
    samples: int = 8
    steps: int = 50
    guidance: float = 7.5


@dataclass(frozen=True)
class PaperOptions:
    """One options file.

    Args:
        name: Of the run.
        model: Folder or name of the base.
        tokens: Token -> what it starts from, as `train_edlora` takes them.
        training: Steps, rates and losses; a file for sampling alone has none of them.
        pictures: What is trained on.
        batch_size: Pictures a step and accumulation.
        augmentation: How they vary.
        validation: Prompts and alphas.
        concept: The trained file, in a file for sampling.
    """

    name: str
    model: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    training: EDLoRATraining | None = None
    pictures: tuple[ConceptPicture, ...] = ()
    batch_size: int = 1
    augmentation: Augmentation = field(default_factory=Augmentation)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    concept: Path | None = None


def read_paper_options(path: PathLike, *, mixed_precision: bool = False) -> PaperOptions:
    """An options file of Mix-of-Show's code, for training (options/train) or sampling (options/test).

    Paths in it are looked for from the working folder and from every folder above the file. Steps are
    pictures × dataset_enlarge_ratio ÷ (batch × accumulation), rounded up.

    Args:
        path: The file.
        mixed_precision: Take the file's (fp16), which a CPU does not want.

    Returns:
        The options that training, sampling or validation here takes of it.

    Raises:
        MoleFileError: No YAML, a key that is missing or of another kind, a file in it that is not there.
        MoleValueError: What is not trained here: a LoRA without layers' embeddings, experts elsewhere than on
            attention, a transform or optimiser that is not known.
        MoleStateError: PyYAML is missing.
    """
    options = _Options(_yaml(path), printable(path, 300), Path(os.fsdecode(path)).resolve())
    if not options.get("models.enable_edlora", bool):
        raise MoleValueError(
            f"{options.where}: models.enable_edlora",
            expected="true",
            got="false",
            hint="train_expert trains a plain LoRA",
        )
    model, name = options.get("models.pretrained_path", str), str(options.table.get("name", ""))
    if "train" not in options.table:
        concept = options.path("path.lora_path", must=False)
        return PaperOptions(name, model, validation=_validation(options), concept=concept)
    tokens = _tokens(options)
    pictures = tuple(_pictures(options))
    batch = options.get("datasets.train.batch_size_per_gpu", int)
    accumulation = options.get("gradient_accumulation_steps", int, 1)
    enlarged = len(pictures) * options.get("datasets.train.dataset_enlarge_ratio", float)
    mixed = options.get("mixed_precision", str, "no") if mixed_precision else "no"
    config = TrainConfig(
        steps=math.ceil(enlarged / (batch * accumulation)),
        lr=options.get("models.finetune_cfg.unet.lr", float),
        schedule="linear",
        weight_decay=options.get("train.optim_g.weight_decay", float, 0.01),
        betas=tuple(options.get("train.optim_g.betas", list, [0.9, 0.999])),
        accumulation=accumulation,
        seed=options.get("manual_seed", int, 0),
        mixed_precision=mixed,
        checkpoint_every=int(options.get("logger.save_checkpoint_freq", float, 1000)),
    )
    return PaperOptions(
        name,
        model,
        tokens,
        _training(options, config),
        pictures,
        batch,
        _augmentation(options),
        _validation(options, required=False),
    )


class _Options:
    """A file's table, with keys by dots."""

    def __init__(self, table: Mapping[str, Any], where: str, path: Path) -> None:
        self.table, self.where, self.file = table, where, path

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value: Any = self.table
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None and default is not None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise MoleFileError(f"{self.where}: {key}", expected=kind.__name__, got=printable(value))
        return value

    def path(self, key: str, must: bool = True) -> Path:
        return self.find(self.get(key, str), key, must)

    def find(self, text: str, key: str, must: bool = True) -> Path:
        """A path as it is written, from the working folder or from a folder above the file."""
        for base in (Path.cwd(), *self.file.parents):
            if (base / text).exists():
                return base / text
        if must:
            raise MoleFileError(
                f"{self.where}: {key}",
                f"there is no {printable(text)}",
                hint="start where the file's paths begin, or put the data beside the file",
            )
        return Path(text)


def _yaml(path: PathLike) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MoleStateError(
            "options", f"needs PyYAML ({error})", hint='pip install "mole-kernels[diffusers]"'
        ) from error
    where = printable(path, 300)
    try:
        table = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise MoleFileError(where, f"is no YAML that can be read ({printable(error, 300)})") from error
    if not isinstance(table, Mapping):
        raise MoleFileError(where, expected="a table of options", got=type(table).__name__)
    return table


def _tokens(options: _Options) -> dict[str, str]:
    names = options.get("models.new_concept_token", str).split("+")
    starts = options.get("models.initializer_token", str, "+".join(["<rand-0.017>"] * len(names))).split("+")
    if len(names) != len(starts):
        raise MoleFileError(
            f"{options.where}: models.initializer_token",
            expected=f"{len(names)} starts joined by +",
            got=f"{len(starts)}",
        )
    return dict(zip(names, starts))


def _training(options: _Options, config: TrainConfig) -> EDLoRATraining:
    parts = {"text_encoder": "CLIPAttention", "unet": "Attention"}
    ranks, alphas = [], []
    for part, wanted in parts.items():
        where = options.get(f"models.finetune_cfg.{part}.lora_cfg.where", str)
        if where != wanted:
            raise MoleValueError(
                f"{options.where}: models.finetune_cfg.{part}.lora_cfg.where", expected=wanted, got=where
            )
        ranks.append(options.get(f"models.finetune_cfg.{part}.lora_cfg.rank", int))
        alphas.append(options.get(f"models.finetune_cfg.{part}.lora_cfg.alpha", float))
    if len(set(ranks)) > 1 or len(set(alphas)) > 1:
        raise MoleValueError(
            f"{options.where}: lora_cfg", expected="one rank and alpha", got=f"{ranks} and {alphas}"
        )
    if (kind := options.get("train.optim_g.type", str)) != "AdamW":
        raise MoleValueError(f"{options.where}: train.optim_g.type", expected="AdamW", got=printable(kind))
    has_masks = options.get("datasets.train.use_mask", bool, False)
    return EDLoRATraining(
        config,
        embedding_lr=options.get("models.finetune_cfg.text_embedding.lr", float),
        text_encoder_lr=options.get("models.finetune_cfg.text_encoder.lr", float),
        rank=ranks[0],
        alpha=alphas[0],
        norm_limit=options.get("train.emb_norm_threshold", float, 0.55),
        noise_offset=options.get("models.noise_offset", float, 0.0),
        masked=options.get("models.use_mask_loss", bool, True) and has_masks,
        attention=options.get("models.attn_reg_weight", float, 0.0) if has_masks else 0.0,
        full_identity=options.get("models.reg_full_identity", bool, True),
    )


def _augmentation(options: _Options) -> Augmentation:
    settings: dict[str, Any] = {}
    for number, entry in enumerate(options.get("datasets.train.instance_transform", list)):
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        try:
            if kind in _KINDS:
                settings |= {"kind": _KINDS[kind], "size": int(entry["size"]), "crop": float(entry["crop_p"])}
                if "scale_ratio" in entry:
                    settings["scale"] = tuple(float(value) for value in entry["scale_ratio"])
            elif kind == "PairRandomHorizontalFlip":
                settings["flip"] = float(entry.get("p", 0.5))
            elif kind == "ShuffleCaption":
                settings["shuffle_after"] = int(entry["keep_token_num"])
            elif kind == "EnhanceText":
                settings["templates"] = TEMPLATES[_TEXTS[entry.get("enhance_type", "object")]]
            elif kind not in _PLAIN:
                raise KeyError(kind)
        except (KeyError, TypeError, ValueError) as error:
            raise MoleValueError(
                f"{options.where}: datasets.train.instance_transform[{number}]",
                expected=f"one of {', '.join((*_KINDS, 'PairRandomHorizontalFlip', 'ShuffleCaption'))}, "
                "EnhanceText with its settings",
                got=printable(entry),
            ) from error
    return Augmentation(**settings)


def _pictures(options: _Options) -> Iterator[ConceptPicture]:
    """Pictures of the concept list, captions by the first line of a text of their name, else the prompt."""
    key = "datasets.train.concept_list"
    source = options.path(key)
    entries = read_json_file(source)
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise MoleFileError(printable(source, 300), expected="a list of concepts", got=printable(entries))
    captions = options.get("datasets.train.use_caption", bool, False)
    masked = options.get("datasets.train.use_mask", bool, False)
    words = options.get("datasets.train.replace_mapping", dict, {})
    for number, entry in enumerate(entries):
        own = _Options(entry, f"{printable(source, 300)}, entry {number}", options.file)
        folder = own.path("instance_data_dir")
        texts = own.path("caption_dir") if captions and entry.get("caption_dir") else None
        masks = own.path("mask_dir") if masked and entry.get("mask_dir") else None
        files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
        if not files:
            raise MoleFileError(printable(folder, 300), expected="pictures", got="none")
        for file in files:
            text = own.get("instance_prompt", str)
            beside = None if texts is None else texts / f"{file.stem}.txt"
            if beside is not None and beside.exists():
                text = next(iter(text_lines(read_text(beside))), "")
            mask = None if masks is None else masks / f"{file.stem}.png"
            if mask is not None and not mask.exists():
                raise MoleFileError(
                    printable(masks, 300), expected=f"a mask for {printable(file.name)}", got="none"
                )
            yield ConceptPicture(file, _replaced(text, words), mask)


def _validation(options: _Options, required: bool = True) -> ValidationOptions:
    key = "datasets.val_vis"
    if not required and not isinstance(options.table.get("datasets", {}).get("val_vis"), Mapping):
        return ValidationOptions()
    prompts = options.table["datasets"]["val_vis"].get("prompts")
    if isinstance(prompts, str):
        lines = list(text_lines(read_text(options.find(prompts, f"{key}.prompts"))))
    else:
        lines = options.get(f"{key}.prompts", list)
    words = options.get(f"{key}.replace_mapping", dict, {})
    alphas = options.get("val.alpha_list", list, [1.0])
    if not alphas or not all(isinstance(a, int | float) and math.isfinite(a) for a in alphas):
        raise MoleFileError(f"{options.where}: val.alpha_list", expected="numbers", got=printable(alphas))
    return ValidationOptions(
        tuple(_replaced(str(line), words) for line in lines if str(line).strip()),
        tuple(map(float, alphas)),
        options.get(f"{key}.num_samples_per_prompt", int, 8),
        options.get("val.sample.num_inference_steps", int, 50),
        options.get("val.sample.guidance_scale", float, 7.5),
    )


def _replaced(text: str, words: Mapping[str, str]) -> str:
    for word, by in words.items():
        text = text.replace(str(word), str(by))
    return re.sub(" +", " ", text.strip())
