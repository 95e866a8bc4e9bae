"""Merging and compressing files: layer by layer from disk to disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from typing_extensions import Unpack

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleValueError, printable
from mole_kernels.experts.compress import CompressionTarget, compress_layer
from mole_kernels.experts.compress_report import NOMINAL, CompressedLayer, Predicted, Report
from mole_kernels.experts.compress_spectrum import LayerSpectrum, layer_spectrum
from mole_kernels.experts.lazy import layer_size
from mole_kernels.experts.lowrank import Expert, LowRank, is_denoiser, split_component
from mole_kernels.experts.merge import MergeOptions, MergePlan, common_dialect, plan_merge
from mole_kernels.files.opening import PathLike
from mole_kernels.io.dialects.families import agree, families, titles
from mole_kernels.io.dialects.own import classes_with_layers
from mole_kernels.io.dialects.paths import kohya_name, looks_like_sdxl
from mole_kernels.io.resolve import Pipeline
from mole_kernels.io.save import LoraDialect
from mole_kernels.io.source import adapter_name
from mole_kernels.io.stream import open_experts, save_layers

# layers done, layers in all, the path of the layer just done
Progress = Callable[[int, int, str], None]


def merge_files(
    sources: Sequence[PathLike],
    target: PathLike,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    mode: str = "delta_mean",
    *,
    to: LoraDialect | None = None,
    sdxl: bool | None = None,
    pipeline: Pipeline = "auto",
    scale: float | Mapping[str, float] | None = None,
    progress: Progress | None = None,
    **options: Unpack[MergeOptions],
) -> MergePlan:
    """Merge adapter files of any dialects into one file, in the memory of one layer.

    Layers are matched by what they are in the model, not by how a file spells them. Everything but NaN is
    checked before the first byte is written: the files, their model, the sizes, the names in the result's
        dialect, the place on the disk. The target is written atomically.

    Args:
        sources: LoRA files or folders, and single files of ours (all their experts; these are read whole). An
            expert's name is its file's.
        target: The safetensors file to write; may not be a source.
        weights: By name or in the order of the experts, may be negative; None: exactly 1/T for each of T.
        mode: As `merge`'s.
        to: The result's dialect; None: kohya where all are kohya, else diffusers.
        sdxl: Kohya's dialect only: LDM's block names; None decides by the layers.
        pipeline: As `load_expert`'s: what the names are resolved against. "auto" tells the pipeline's class
            from the keys; None takes names as they are.
        progress: Called after each layer with (layers done, layers in all, path).
        **options: rank, density, majority_sign_method, seed and dtype, as `merge`'s.

    Returns:
        The plan that was carried out: weights by name, and which experts have which layer.

    Raises:
        MoleFileError: A file that cannot be read, or a target that cannot be written.
        MoleKeyError: Names that cannot be told, or that the dialect does not cover.
        MoleShapeError: Layers of one name and several sizes.
        MoleValueError: Experts of different models, weights or options that do not fit, NaN.

    Example:
        >>> merge_files(["face.safetensors", "style.safetensors"], "both.safetensors", [0.7, 0.3])
    """
    _check_target(target, sources, to)
    if to == "kohya" and _is_auto(pipeline):
        # names that kohya's tools gave are theirs to read
        pipeline = None
    with ExitStack() as stack:
        experts: dict[str, Expert] = {}
        for path in sources:
            for name, expert in stack.enter_context(open_experts(path, pipeline=pipeline)).items():
                experts[_free(name, experts)] = expert
        plan = plan_merge(experts, weights, mode, **options)
        _check_one_model(experts)
        _check_space(target, 2 * plan.size())
        shares = ", ".join(f"{weight:g} {name}" for name, weight in plan.weights.items())
        layers = counted(_scaled(plan, scale), len(plan.where), progress)
        _save(layers, target, plan.paths(), to, common_dialect(experts), f"{mode} of {shares}", sdxl)
    return plan


def compress_file(
    source: PathLike,
    target: PathLike | None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    expert: str | None = None,
    dtype: torch.dtype | None = None,
    predicted: Predicted = NOMINAL,
    to: LoraDialect | None = None,
    sdxl: bool | None = None,
    pipeline: Pipeline = "auto",
    progress: Progress | None = None,
) -> Report:
    """Compress an adapter file, in the memory of one layer.

    Args:
        source: A LoRA file or folder, or a single file of ours.
        target: The safetensors file to write, atomically; None: only the report is made.
        rank: At most this rank.
        energy: The smallest rank that keeps this part of Σσ², in (0, 1].
        max_error: The smallest rank with this relative error for any input.
        expert: Which expert of a single file.
        dtype: Of the factors; None keeps theirs.
        predicted: The call that times are predicted for.
        to: The result's dialect; None keeps kohya's, else diffusers.
        sdxl: Kohya's dialect only: LDM's block names; None decides by the layers.
        pipeline: As `load_expert`'s. "auto" leaves a kohya file that stays one in its own names, and tells
            the pipeline's class of others from the keys.
        progress: Called after each layer with (layers done, layers in all, path).

    Returns:
        Ranks, errors and predictions of each layer.

    Raises:
        MoleFileError: A file that cannot be read, or a target that cannot be written.
        MoleKeyError: Names that cannot be told, or that the dialect does not cover.
        MoleValueError: Not exactly one of rank, energy and max_error, or NaN.

    Example:
        >>> compress_file("face.safetensors", "small.safetensors", energy=0.99).total()["rank_after"]
        12
    """
    goal = CompressionTarget(rank, energy, max_error)
    if target is not None:
        _check_target(target, [source], to)
    reports: list[CompressedLayer] = []
    with _opened(source, expert, to, pipeline) as chosen:

        def layers() -> Iterator[tuple[str, LowRank]]:
            for path in chosen.layers:
                smaller, report = compress_layer(path, chosen.layers[path], goal, dtype, predicted)
                reports.append(report)
                yield path, smaller

        smaller_layers = counted(layers(), len(chosen.layers), progress)
        if target is None:
            for _ in smaller_layers:
                pass
        else:
            how = ", ".join(f"{name}={value:g}" for name, value in vars(goal).items() if value is not None)
            origin = f"{adapter_name(source)} compressed, {how}"
            _save(smaller_layers, target, list(chosen.layers), to, chosen.dialect, origin, sdxl)
    return Report(tuple(reports), predicted)


def spectra_of_file(
    source: PathLike, *, expert: str | None = None, progress: Progress | None = None
) -> list[LayerSpectrum]:
    """The spectrum of every layer of a file, layer by layer."""
    with open_experts(source) as experts:
        chosen = _pick(experts, expert, source)
        spectra = []
        for i, path in enumerate(chosen.layers, 1):
            spectra.append(layer_spectrum(path, chosen.layers[path], torch.float32))
            if progress is not None:
                progress(i, len(chosen.layers), path)
        return spectra


def counted(
    layers: Iterator[tuple[str, LowRank]], total: int, progress: Progress | None
) -> Iterator[tuple[str, LowRank]]:
    """The same layers; `progress` hears of each."""
    for i, (path, layer) in enumerate(layers, 1):
        yield path, layer
        if progress is not None:
            progress(i, total, path)


def _scaled(plan: MergePlan, scale: float | Mapping[str, float] | None) -> Iterator[tuple[str, LowRank]]:
    """The merged layers, times the scale of their component.

    Raises:
        MoleValueError: A component that the result does not have, or no finite number.
    """
    components = {split_component(path)[0] or "transformer" for path in plan.where}
    everywhere = dict.fromkeys(components, 1.0 if scale is None or isinstance(scale, Mapping) else scale)
    scales = scale if isinstance(scale, Mapping) else everywhere
    for name, number in scales.items():
        if name not in components:
            raise MoleValueError(
                "merge, scale",
                expected=f"components among {', '.join(sorted(components))}",
                got=printable(name),
            )
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise MoleValueError(
                f"merge, scale of {printable(name)}", expected="a finite number", got=printable(number, 60)
            )

    def layers() -> Iterator[tuple[str, LowRank]]:
        for path, layer in plan.layers():
            factor = scales.get(split_component(path)[0] or "transformer", 1.0)
            yield path, layer if factor == 1 else replace(layer, scale=layer.scale * factor)

    return layers()


@contextmanager
def _opened(
    source: PathLike, name: str | None, to: LoraDialect | None, pipeline: Pipeline
) -> Iterator[Expert]:
    """One expert of a file. A kohya file that stays one keeps its names, which every reader of it knows."""
    if _is_auto(pipeline):
        with open_experts(source) as experts:
            expert = _pick(experts, name, source)
            if expert.dialect == "kohya" and to in (None, "kohya"):
                yield expert
                return
    with open_experts(source, pipeline=pipeline) as experts:
        yield _pick(experts, name, source)


def _is_auto(pipeline: Pipeline) -> bool:
    return isinstance(pipeline, str) and pipeline == "auto"


def _save(
    layers: Iterator[tuple[str, LowRank]],
    target: PathLike,
    paths: list[str],
    to: LoraDialect | None,
    read_as: str,
    origin: str,
    sdxl: bool | None,
) -> None:
    covered = read_as == "kohya" and all(kohya_name(path, sdxl=False) for path in paths)
    save_layers(
        layers,
        target,
        to or ("kohya" if covered else "diffusers"),
        read_as=read_as,
        origin=origin,
        sdxl=looks_like_sdxl(paths) if sdxl is None else sdxl,
        paths=paths,
    )


def _check_target(target: PathLike, sources: Sequence[PathLike], to: str | None) -> None:
    """Refuse a target that is a source, or has no folder, before any work is done."""
    where, folder = printable(target, 300), Path(os.path.realpath(target)).parent
    if to not in (None, *get_args(LoraDialect)):
        raise MoleValueError("to", expected="diffusers or kohya", got=f"'{printable(to)}'")
    for source in sources:
        if os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source):
            raise MoleValueError(where, "the output is one of the inputs", hint="choose another name")
    if not os.path.isdir(folder):
        raise MoleFileError(where, f"there is no folder {printable(folder, 300)} to write it in")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MoleFileError(where, f"its folder {printable(folder, 300)} cannot be written to")
    if os.path.isdir(target):
        raise MoleFileError(where, expected="a file name", got="a folder")


def _check_space(target: PathLike, needed: int) -> None:
    """Refuse a disk that is too full, before hours of work."""
    folder = os.path.dirname(os.path.realpath(target))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MoleFileError(
            printable(target, 300),
            f"the disk of {printable(folder, 300)} is too full",
            expected=f"{needed:,} free bytes (the result, and as much again while it is written)",
            got=f"{free:,}",
        )


def _check_one_model(experts: Mapping[str, Expert]) -> None:
    """Refuse experts of different models: no model could read what became of them.

    Raises:
        MoleValueError: Two experts that fit no model together, with what each is for.
    """
    # expert -> families, and diffusers' classes, that have its layers
    known: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for name, expert in experts.items():
        parts = {path: split_component(path) for path in expert.layers}
        denoiser = {path: rest for path, (component, rest) in parts.items() if is_denoiser(component)}
        if not denoiser:
            continue
        widths = {path: layer_size(expert.layers, path).K for path in denoiser}
        known[name] = families(widths), classes_with_layers(denoiser.values())
    for i, (name, (family, classes)) in enumerate(known.items()):
        for other, (family2, classes2) in list(known.items())[:i]:
            apart = bool(family and family2) and not agree(family, family2)
            if classes and classes2 and not apart:
                apart = not set(classes) & set(classes2)
            if apart:
                raise MoleValueError(
                    "merge",
                    f"{printable(other)} and {printable(name)} are for different models",
                    got=f"{_for(family2, classes2)}, and {_for(family, classes)}",
                    hint="an adapter fits the one model that it was trained on",
                )


def _for(family: tuple[str, ...], classes: tuple[str, ...]) -> str:
    return titles(family) if family else " or ".join(classes[:3])


def _pick(experts: Mapping[str, Expert], name: str | None, source: PathLike) -> Expert:
    if name is None and len(experts) == 1:
        return next(iter(experts.values()))
    if name is None or name not in experts:
        raise MoleKeyError(
            printable(source, 300),
            expected=f"--expert as one of {', '.join(experts)}",
            got=printable(name),
        )
    return experts[name]


def _free(name: str, names: Mapping[str, Expert]) -> str:
    """The name, numbered where another file has it already."""
    free, i = name, 2
    while free in names:
        free, i = f"{name[:120]}-{i}", i + 1
    return free
