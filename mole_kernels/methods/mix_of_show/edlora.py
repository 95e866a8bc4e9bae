"""ED-LoRA: a concept as two kinds of new tokens with one embedding per cross-attention layer, and low-rank
experts beside them.

    V = V_rand⁺ V_class⁺        e.g. {"<potter1>": "<rand-0.013>", "<potter2>": "man"}: two tokens, L
    embeddings each, all learned

Every caption is encoded L times, its tokens replaced by those of layer i, and cross-attention layer i reads
the i-th text. Experts sit on
every attention linear of UNet and text encoders; alpha multiplies ΔW as it is. Nothing of the base changes,
nor any other word.

Source: Mix-of-Show (Gu et al., NeurIPS 2023); the norm limit, the masks and the attention loss are those of
its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.bank import ExpertBank, Init
from mole_kernels.experts.lowrank import Expert
from mole_kernels.layers.linear import Gated
from mole_kernels.methods.mix_of_show.attention_loss import AttentionLoss, PaperAttentionLoss
from mole_kernels.methods.mix_of_show.augmented import AugmentedConcept
from mole_kernels.methods.mix_of_show.concept import Concept
from mole_kernels.methods.mix_of_show.prompts import encode_ids, layered
from mole_kernels.methods.mix_of_show.tokens import (
    Tokens,
    concept_tokens,
    new_embeddings,
    portable,
    text_encoders,
)
from mole_kernels.modules.scan import scan, sizes, uncompiled
from mole_kernels.patching.apply import patch
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches, counted_generator
from mole_kernels.training.loop import RunOptions, fit
from mole_kernels.training.loss import denoising_loss
from mole_kernels.training.processes import processes

UNET, TEXT = ("to_q", "to_k", "to_v", "to_out.0"), ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class EDLoRATraining:
    """How a concept is trained; the numbers are the paper's.

    Args:
        config: Its lr is the UNet expert's.
        embedding_lr: Learning rate of the embeddings; warmup and schedule are the config's.
        text_encoder_lr: Learning rate of the experts on text encoders.
        rank: Rank of the experts.
        alpha: ΔW = alpha B A; not divided by the rank.
        init: How A is drawn: "kaiming", or "gaussian" as in the research branch.
        norm_limit: The embeddings stand still once their mean norm has come to it; None: never.
        noise_offset: σ of a constant added to each channel's noise.
        masked: The loss counts where a batch's mask is; else where its picture is.
        mask_form: "paper": the mean over pictures of Σ mask·error / Σ mask, the errors of a place summed
            over the channels, as in the paper's code; "batch": one mean over all that the masks cover.
        attention: Weight of the attention loss, which needs masks; 0 for none (the paper's code: 0.01).
        attention_form: "paper" for `PaperAttentionLoss`, "per_layer" for `AttentionLoss`.
        full_identity: See `PaperAttentionLoss`; the paper's files set it to False for people.
    """

    config: TrainConfig
    embedding_lr: float = 1e-3
    text_encoder_lr: float = 1e-5
    rank: int = 4
    alpha: float = 1.0
    init: Init = "kaiming"
    norm_limit: float | None = 0.55
    noise_offset: float = 0.01
    masked: bool = False
    mask_form: Literal["paper", "batch"] = "paper"
    attention: float = 0.0
    attention_form: Literal["paper", "per_layer"] = "paper"
    full_identity: bool = True


def paper_training(steps: int, **options: Any) -> EDLoRATraining:
    """AdamW with 1e-4 on the UNet, 1e-5 on the text encoder, 1e-3 on the embeddings, falling linearly to 0.

    Args:
        steps: Steps of training.
        **options: Other fields of `EDLoRATraining`.

    Returns:
        The settings.
    """
    return EDLoRATraining(TrainConfig(steps=steps, lr=1e-4, schedule="linear", weight_decay=1e-2, **options))


def train_edlora(
    pipe: Any,
    batches: TensorBatches | AugmentedConcept,
    tokens: Mapping[str, str],
    training: EDLoRATraining,
    **run: Unpack[RunOptions],
) -> Concept:
    """Trains a concept; the pipeline is bit for bit as before at its end.

    Args:
        batches: From `concept_batches`, each picture always the same, or an `AugmentedConcept`: latents,
            ids of their captions, masks where there are any.
        tokens: The concept's tokens in the order in which prompts use them -> `<rand-σ>` or the class
            word they start from.
        run: run_dir, resume, progress, on_step, trackers: as in `fit`.

    Returns:
        The trained concept.

    Raises:
        MoleValueError: Tokens that are no new words, and what `fit` raises.
    """
    config, name = training.config, " ".join(tokens)
    if processes().num_processes > 1:
        raise MoleStateError(
            "train_edlora", "runs in one process: text encoders and embeddings are trained through hooks"
        )
    _check(training, batches)
    start = new_embeddings(pipe, tokens, counted_generator(config.seed, "embeddings", name))
    layers = attention_linears(pipe)
    fresh = ExpertBank.new(
        {path: sizes(m) for path, m in layers.items()},
        ["concept"],
        training.rank,
        training.alpha,
        convention="mix_of_show",
        generator=counted_generator(config.seed, "expert", name),
        init=training.init,
    )
    with concept_tokens(pipe, start) as known, patch(pipe, fresh, allow_large_rank=True) as handle:
        model = ConceptModel(pipe, known, start, training.norm_limit)
        for layer in handle.layers.values():
            layer.experts.float()  # type: ignore[union-attr, operator]
        named, rates = _trained(model, handle.layers, training)
        identity = {"method": "mix_of_show", "concept": name, "start": " ".join(tokens.values())} | {
            key: str(getattr(training, key)) for key in EDLoRATraining.__dataclass_fields__ if key != "config"
        }
        loss_fn = ConceptLoss(model, training)
        with model.learning(), loss_fn.listening():
            result = fit(
                model, named, batches, config, loss_fn=loss_fn, identity=identity, rates=rates, **run
            )
        trained = handle.bank().experts["concept"]
        embeddings = model.embeddings()
    metadata = identity | {"steps": str(result.steps), "loss": f"{result.late_loss():.6g}"}
    factors = {path: factor.to(device="cpu") for path, factor in trained.layers.items()}
    return Concept(
        name, Expert(portable(factors), source=f"trained concept {name}", metadata=metadata), embeddings
    )


def attention_linears(pipe: Any) -> dict[str, nn.Module]:
    """{path: layer}: q, k, v and output of every attention of UNet and text encoders; 128 and 48 in Stable
    Diffusion 1.5.
    """
    layers = {}
    for path, module in scan(pipe).layers.items():
        component = path.partition(".")[0]
        if (
            component == "unet"
            and path.endswith(tuple(f".{n}" for n in UNET))
            and (".attn1." in path or ".attn2." in path)
        ) or (component in text_encoders(pipe) and path.endswith(tuple(f".self_attn.{n}" for n in TEXT))):
            layers[path] = module
    return layers


class ConceptModel(nn.Module):
    """UNet, text encoders and the concept's embeddings as one model, for `fit`.

    Attributes:
        table: Text encoder -> Parameter [tokens, L, K], looked up in the place of the rows that
            `concept_tokens` made.
    """

    def __init__(
        self, pipe: Any, tokens: Tokens, start: Mapping[str, Mapping[str, Tensor]], norm_limit: float | None
    ) -> None:
        super().__init__()
        self.unet = uncompiled(pipe.unet)
        self.encoders = nn.ModuleDict({name: encoder for name, (encoder, _) in text_encoders(pipe).items()})
        device = next(self.unet.parameters()).device
        self.table = nn.ParameterDict(
            {
                name: nn.Parameter(torch.stack([start[t][name] for t in start]).float().to(device))
                for name in self.encoders
            }
        )
        self.tokens, self.norm_limit, self.pipe = tokens, norm_limit, pipe

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.unet.is_gradient_checkpointing)

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        self.unet.disable_gradient_checkpointing()  # type: ignore[operator]

    def embeddings(self) -> dict[str, dict[str, Tensor]]:
        """token -> text encoder -> V [L,K], copies on the CPU."""
        names = list(self.tokens.names)
        return {
            t: {name: p.detach()[i].cpu().clone() for name, p in self.table.items()}
            for i, t in enumerate(names)
        }

    def mean_norm(self) -> float:
        """Mean norm of the concept's embeddings over tokens, layers and text encoders."""
        return torch.cat([p.detach().norm(dim=-1).flatten() for p in self.table.values()]).mean().item()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While it lasts, the concept's ids are looked up in `table`."""
        with ExitStack() as stack:
            for name, encoder in self.encoders.items():
                ids = [i for t in self.tokens.names for i in self.tokens.ids[t][name]]
                look = partial(self._look_up, name, ids[0], len(ids))
                stack.callback(encoder.get_input_embeddings().register_forward_hook(look).remove)  # type: ignore[operator]
            yield

    def _look_up(
        self, name: str, first: int, count: int, _: nn.Module, args: tuple[Tensor, ...], out: Tensor
    ) -> Tensor:
        ids, table = args[0], self.table[name].flatten(0, 1)
        # without a gradient the optimiser leaves it alone, decay included; so it stays where it is, also
        # after a resume
        if self.norm_limit is not None and self.mean_norm() >= self.norm_limit:
            table = table.detach()
        ours = (ids >= first) & (ids < first + count)
        return torch.where(ours[..., None], table[(ids - first).clamp(0, count - 1)].to(out), out)


class ConceptLoss:
    """loss(model, batch, generator) for `fit`: noise with an offset, texts layer by layer, the error where
    the mask is.
    """

    def __init__(self, model: ConceptModel, training: EDLoRATraining) -> None:
        self.model, self.training = model, training
        self.attention: AttentionLoss | None = None
        if training.attention and training.attention_form == "paper":
            self.attention = PaperAttentionLoss(model.unet, model.tokens, training.full_identity)
        elif training.attention:
            self.attention = AttentionLoss(model.unet, model.tokens)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The hooks that bring each layer its text, and those that look at attention where that is wanted."""
        length = text_encoders(self.model.pipe)["text_encoder"][1].model_max_length
        with layered(self.model.unet, length), self.attention.listening() if self.attention else ExitStack():
            yield

    def __call__(self, _: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        latents, pipe = batch["latents"], self.model.pipe
        noise = torch.randn(latents.shape, generator=generator)
        noise = noise + self.training.noise_offset * torch.randn(
            *latents.shape[:2], 1, 1, generator=generator
        )
        timesteps = torch.randint(
            0, len(pipe.scheduler.alphas_cumprod), (len(latents),), generator=generator
        ).to(latents.device)
        ids = {name: batch[f"ids_{name}"] for name in self.model.encoders}
        text = encode_ids(pipe, ids)
        added = (
            None
            if text.pooled is None
            else {"text_embeds": text.pooled, "time_ids": batch["time_ids"].to(text.pooled)}
        )
        mask = batch.get("mask")
        if self.attention is not None:
            self.attention.forget()
        counted = mask if self.training.masked else batch.get("image_mask")
        loss = denoising_loss(
            self.model.unet,
            pipe.scheduler,
            latents,
            timesteps,
            noise.to(latents),
            text.flat,
            added,
            self.training.config.snr_gamma,
            counted,
            per_picture=self.training.mask_form == "paper",
        )
        if self.attention is not None:
            assert mask is not None
            loss = loss + self.training.attention * self.attention.take(ids["text_encoder"], mask)
        return loss


def _trained(
    model: ConceptModel, layers: Mapping[str, nn.Module], training: EDLoRATraining
) -> tuple[dict[str, Any], dict[str, float]]:
    """(parameters by name, their rates against the config's)."""
    named: dict[str, Any] = {f"embeddings.{name}": p for name, p in model.table.items()}
    rates = dict.fromkeys(named, training.embedding_lr / training.config.lr)
    for path, module in layers.items():
        assert isinstance(module, Gated)
        for half in ("down", "up"):
            named[f"{path}.{half}"] = getattr(module.experts, half)
            if path.startswith("text_encoder"):
                rates[f"{path}.{half}"] = training.text_encoder_lr / training.config.lr
    return named, rates


def _check(training: EDLoRATraining, batches: TensorBatches | AugmentedConcept) -> None:
    for key in ("embedding_lr", "text_encoder_lr", "noise_offset", "attention"):
        if not getattr(training, key) >= 0:
            raise MoleValueError(f"train_edlora: {key}", expected="at least 0", got=getattr(training, key))
    if training.norm_limit is not None and not training.norm_limit > 0:
        raise MoleValueError("train_edlora: norm_limit", expected="above 0, or None", got=training.norm_limit)
    forms = {"mask_form": ("paper", "batch"), "attention_form": ("paper", "per_layer")}
    for key, known in forms.items():
        if getattr(training, key) not in known:
            raise MoleValueError(
                f"train_edlora: {key}", expected=" or ".join(known), got=repr(getattr(training, key))
            )
    masks = batches.has_masks if isinstance(batches, AugmentedConcept) else "mask" in batches.tensors
    if (training.masked or training.attention) and not masks:
        hint = "concept_batches(…, masks=folder), or masked=False and attention=0"
        raise MoleValueError(
            "train_edlora",
            expected="masks, which the masked loss and the attention loss need",
            got="none",
            hint=hint,
        )
