"""Means over pictures of cosines: with their texts, with references, with one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_kernels.errors import MoleValueError
from mole_kernels.metrics.folders import Sample, references_of, with_texts
from mole_kernels.metrics.models import ClipModel, ImageModel, same_width
from mole_kernels.metrics.result import Result, mean_result


def clip_t(samples: Sequence[Sample], model: ClipModel) -> Result:
    """CLIP-T: the mean over pictures of cos(picture, its prompt).

    Equals torchmetrics' CLIPScore ÷ 100 where no cosine is negative.

    Args:
        samples: Pictures with texts.
        model: A CLIP; papers of this field take ViT-B/32 or ViT-L/14.

    Raises:
        MoleValueError: A picture without a prompt.

    Source: Radford et al., ICML 2021; as a metric of personalisation, Ruiz et al., CVPR 2023.
    """
    own = with_texts(samples, "CLIP-T")
    pictures, texts = model.images([s.image() for s in own]), model.texts([s.text for s in own])
    same_width(pictures, texts, "CLIP-T")
    return mean_result("CLIP-T", (pictures * texts).sum(1).tolist(), model)


def clip_i(samples: Sequence[Sample], references: Sequence[Sample], model: ClipModel | ImageModel) -> Result:
    """CLIP-I: the mean over pictures of the mean cosine with all references of their subject.

    Args:
        samples: Pictures; where references name subjects, with theirs.
        references: Pictures of the subjects.
        model: A CLIP.

    Source: Ruiz et al., CVPR 2023 (DreamBooth).
    """
    return _against("CLIP-I", samples, references, model)


def dino(samples: Sequence[Sample], references: Sequence[Sample], model: ImageModel) -> Result:
    """DINO: as CLIP-I, by the first token of a self-supervised vision transformer (ViT-S/16 in the paper).

    Source: Caron et al., ICCV 2021; as a metric, Ruiz et al., CVPR 2023.
    """
    return _against("DINO", samples, references, model)


def diversity(samples: Sequence[Sample], model: ClipModel | ImageModel) -> Result:
    """1 − mean cosine between pictures of one prompt and subject, the mean over such groups; 0 for
    pictures all
    alike.

    The part of LPIPS (DreamBooth's DIV) is played by the vectors of any model here.

    Raises:
        MoleValueError: No two pictures of one prompt.
    """
    vectors = model.images([s.image() for s in samples])
    groups: dict[tuple[str, str], list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault((sample.text, sample.subject), []).append(i)
    values = []
    for places in groups.values():
        if len(places) > 1:
            cosines = vectors[places] @ vectors[places].mT
            off = cosines[~torch.eye(len(places), dtype=torch.bool)]
            values.append(float(1 - off.mean()))
    if not values:
        raise MoleValueError(
            "diversity", expected="two pictures of one prompt", got=f"{len(samples)} of {len(groups)} prompts"
        )
    result = mean_result("diversity", values, model)
    # the figure is one a group, which no two folders need share
    return Result(
        result.metric,
        result.value,
        "higher",
        model.name,
        model.revision,
        len(samples),
        (),
        {"groups": len(values)},
    )


def _against(
    metric: str, samples: Sequence[Sample], references: Sequence[Sample], model: ClipModel | ImageModel
) -> Result:
    if not samples or not references:
        raise MoleValueError(
            metric, expected="pictures and references", got=f"{len(samples)} and {len(references)}"
        )
    places = [references_of(sample, references, metric) for sample in samples]
    pictures, wanted = (model.images([s.image() for s in part]) for part in (samples, references))
    values = [float(_mean_cosine(row, wanted[own])) for row, own in zip(pictures, places)]
    return mean_result(metric, values, model, references=float(len(references)))


def _mean_cosine(row: Tensor, others: Tensor) -> Tensor:
    return (others @ row).mean()
