"""What `mole-kernels train edlora` does: from pictures to a concept's tokens and expert, for `fuse`."""

from __future__ import annotations

import math

from mole_kernels.cli.screen import done
from mole_kernels.cli.train import EDLoRAArgs
from mole_kernels.cli.training import (
    echo,
    is_main,
    named,
    named_dtype,
    picture_folder,
    pipeline_with_unet,
    ready_run,
    run_options,
    settings,
    tell,
)
from mole_kernels.errors import MoleValueError, printable
from mole_kernels.methods.mix_of_show.concept import save_concept
from mole_kernels.methods.mix_of_show.data import concept_batches
from mole_kernels.methods.mix_of_show.edlora import EDLoRATraining, paper_training, train_edlora

ENDINGS = (".safetensors", ".pth")
# the paper's: 800 to 1000 steps of batches of 2 pictures of 512 pixels
STEPS, BATCH, SIDE = 800, 2, 512


def run(asked: EDLoRAArgs) -> None:
    """Train one concept and write it."""
    if asked.out.suffix not in ENDINGS:
        raise MoleValueError(
            "--out", expected=f"a name that ends in {' or '.join(ENDINGS)}", got=printable(asked.out, 300)
        )
    tokens = named(asked.token, "--token", "TOKEN=START, as in <potter1>=<rand-0.013> or <potter2>=man")
    ready_run(asked)
    training = _training(asked)
    # all pictures of one size: the concept's batches are not sorted into buckets
    folder = picture_folder(asked, SIDE, buckets=False)
    before = {
        "concept": " ".join(f"{token} from {start}" for token, start in tokens.items()),
        "rank, alpha": f"{training.rank}, {training.alpha:g}",
        "lr of embeddings": training.embedding_lr,
        "lr of text encoders": training.text_encoder_lr,
        "model": asked.model,
    }
    echo("ED-LoRA", before, training.config, folder)
    pipe = pipeline_with_unet(asked.model, named_dtype(asked.dtype, training.config))
    batches = concept_batches(
        pipe, folder, tokens, asked.batch_size or BATCH, seed=asked.seed, masks=asked.masks
    )
    if asked.dry_run:
        tell("pictures, captions and tokens are right; nothing trained")
        return
    concept = train_edlora(pipe, batches, tokens, training, **run_options(asked))
    if is_main():
        save_concept(concept, asked.out)
        loss = concept.expert.metadata["loss"]
        what = (
            f"{len(concept.embeddings)} tokens, {len(concept.expert.layers)} layers of rank {training.rank}"
        )
        done(str(asked.out), f"concept {concept.name}: {what}, late loss {loss}")


def _training(asked: EDLoRAArgs) -> EDLoRATraining:
    paper = paper_training(asked.steps if asked.steps is not None else STEPS)
    alpha = 1.0 if asked.alpha is None else asked.alpha
    if not math.isfinite(alpha):
        raise MoleValueError("--alpha", expected="a finite number", got=alpha)
    return EDLoRATraining(
        settings(paper.config, asked, asked.seed),
        embedding_lr=asked.embedding_lr,
        text_encoder_lr=asked.text_encoder_lr,
        rank=asked.rank or 4,
        alpha=alpha,
        norm_limit=asked.norm_limit or None,
        noise_offset=asked.noise_offset,
        masked=asked.masks is not None,
        attention=asked.attention,
    )
