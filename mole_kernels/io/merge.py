"""Merging and compressing files: layer by layer from disk to disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleValueError, printable
from mole_kernels.experts.compress import NOMINAL, LayerReport, Predicted, Report, Target, compress_layer
from mole_kernels.experts.compress_spectrum import LayerSpectrum, spectrum
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.experts.merge import MergePlan, common_dialect, plan_merge
from mole_kernels.files.opening import PathLike
from mole_kernels.io.dialects.paths import kohya_name, looks_like_sdxl
from mole_kernels.io.source import adapter_name
from mole_kernels.io.stream import Dialect, open_experts, save_layers

# layers done, layers in all, the path of the layer just done
Progress = Callable[[int, int, str], None]


def merge_files(
    sources: Sequence[PathLike],
    target: PathLike,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    mode: str = "delta_mean",
    *,
    to: Dialect | None = None,
    sdxl: bool | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> MergePlan:
    """Merge expert files into one, in the memory of one layer; `arguments` are those of
    `experts.merge.merge`.

    sources   LoRA files, and single files of ours (all their experts; these are read whole); names are the
              files' names
    to        the result's dialect; None: kohya where all are kohya, else diffusers
    sdxl      kohya only: LDM block names; None decides by the layers
    Everything but NaN is checked before the first layer is read; the target is written atomically and may not
    be a source.
    """
    _check_target(target, sources, to)
    with ExitStack() as stack:
        experts: dict[str, Expert] = {}
        for path in sources:
            for name, expert in stack.enter_context(open_experts(path)).items():
                experts[_free(name, experts)] = expert
        made = plan_merge(experts, weights, mode, **arguments)
        said = ", ".join(f"{weight:g} {name}" for name, weight in made.weights.items())
        layers = counted(made.layers(), len(made.where), progress)
        _save(layers, target, made.paths(), to, common_dialect(experts), f"{mode} of {said}", sdxl)
    return made


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
    to: Dialect | None = None,
    sdxl: bool | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write `source`, compressed, as `target`; with None only the report is made. `expert` names one of a
    single file's.
    """
    asked = Target(rank, energy, max_error)
    if target is not None:
        _check_target(target, [source], to)
    reports: list[LayerReport] = []
    with open_experts(source) as found:
        one = _pick(found, expert, source)

        def layers() -> Iterator[tuple[str, LowRank]]:
            for path in one.layers:
                made, report = compress_layer(path, one.layers[path], asked, dtype, predicted)
                reports.append(report)
                yield path, made

        made = counted(layers(), len(one.layers), progress)
        if target is None:
            for _ in made:
                pass
        else:
            said = ", ".join(f"{name}={value:g}" for name, value in vars(asked).items() if value is not None)
            _save(
                made,
                target,
                list(one.layers),
                to,
                one.dialect,
                f"{adapter_name(source)} compressed, {said}",
                sdxl,
            )
    return Report(tuple(reports), predicted)


def spectra_of_file(
    source: PathLike, *, expert: str | None = None, progress: Progress | None = None
) -> list[LayerSpectrum]:
    """The spectrum of every layer of a file, layer by layer."""
    with open_experts(source) as found:
        one = _pick(found, expert, source)
        made = []
        for i, path in enumerate(one.layers, 1):
            made.append(spectrum(path, one.layers[path], torch.float32))
            if progress is not None:
                progress(i, len(one.layers), path)
        return made


def counted(
    layers: Iterator[tuple[str, LowRank]], total: int, progress: Progress | None
) -> Iterator[tuple[str, LowRank]]:
    """The same layers; `progress` hears of each."""
    for i, (path, layer) in enumerate(layers, 1):
        yield path, layer
        if progress is not None:
            progress(i, total, path)


def _save(
    layers: Iterator[tuple[str, LowRank]],
    target: PathLike,
    paths: list[str],
    to: Dialect | None,
    read_as: str,
    made: str,
    sdxl: bool | None,
) -> None:
    covered = read_as == "kohya" and all(kohya_name(path, sdxl=False) for path in paths)
    to = to or ("kohya" if covered else "diffusers")
    save_layers(
        layers,
        target,
        to,
        read_as=read_as,
        made=made,
        sdxl=looks_like_sdxl(paths) if sdxl is None else sdxl,
        paths=paths,
    )


def _check_target(target: PathLike, sources: Sequence[PathLike], to: str | None) -> None:
    """Refuse a target that is a source, or has no folder, before any work is done."""
    where = printable(target, 300)
    if to not in (None, "diffusers", "kohya"):
        raise MoleValueError("to", expected="diffusers or kohya", got=f"'{printable(to)}'")
    for source in sources:
        if os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source):
            raise MoleValueError(where, "the output is one of the inputs", hint="choose another name")
    if not os.path.isdir(Path(os.path.realpath(target)).parent):
        raise MoleFileError(where, "there is no folder to write it in")
    if os.path.isdir(target):
        raise MoleFileError(where, expected="a file name", got="a folder")


def _pick(found: Mapping[str, Expert], name: str | None, source: PathLike) -> Expert:
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name is None or name not in found:
        raise MoleKeyError(
            printable(source, 300), expected=f"--expert as one of {', '.join(found)}", got=printable(name)
        )
    return found[name]


def _free(name: str, taken: Mapping[str, Expert]) -> str:
    """The name, numbered where another file has it already."""
    made, i = name, 2
    while made in taken:
        made, i = f"{name[:120]}-{i}", i + 1
    return made
