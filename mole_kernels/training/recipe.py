"""A training run, or many, as one YAML file: read, checked whole, and every mistake named at once."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union

from mole_kernels.errors import MoleError, MoleFileError, MoleValueError, printable
from mole_kernels.files.text import read_text
from mole_kernels.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Pictures: see `PictureFolder`. prior: pictures of the class, for prior preservation."""

    folder: Path
    batch_size: int = 1
    resolution: int = 512
    buckets: bool = True
    multiple: int = 64
    on_bad: Literal["refuse", "skip"] = "refuse"
    column: str = "text"
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertSection:
    """One expert: see `FreshExpert`. targets: a regular expression that a layer's path has to hold."""

    name: str
    rank: int = 16
    alpha: float | None = None
    init: Literal["kaiming", "gaussian"] = "kaiming"
    targets: str | None = None
    to: Literal["diffusers", "kohya"] = "diffusers"


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """The loss: see `objective_of` and `FamilyLoss`; min-SNR is `train: snr_gamma`."""

    density: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    weights: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    debiased: bool = False
    noise_offset: float = 0.0
    guidance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ValidationSection:
    """Held-out pictures, looked at every so many steps: see `Validation`."""

    folder: Path
    every: int = 100
    draws: int = 4


@dataclass(frozen=True, kw_only=True)
class JobSection:
    """What one expert is trained on, and how."""

    data: DataSection
    expert: ExpertSection
    train: TrainConfig
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)


@dataclass(frozen=True, kw_only=True)
class Recipe(JobSection):
    """One run. base: a pipeline's folder, its name on the hub, or "demo"; out: the LoRA file."""

    base: str
    out: Path
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    run_dir: Path | None = None
    trackers: tuple[str, ...] = ()
    validation: ValidationSection | None = None


@dataclass(frozen=True, kw_only=True)
class ManyRecipe:
    """Many jobs on one base. out: folder of their files; what stands beside `jobs` is each job's default."""

    base: str
    out: Path
    jobs: tuple[JobSection, ...]
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    run_dir: Path | None = None
    most_samples: int | None = None


def read_recipe(path: Path) -> Recipe:
    """The run of a file.

    Raises:
        MoleFileError: It is no YAML, or holds other keys or values than a run has; all are named.
    """
    return _read(path, Recipe, _plain(path))


def read_many(path: Path) -> ManyRecipe:
    """The jobs of a file; `data`, `expert`, `train` and `objective` beside `jobs` fill what a job leaves out.

    Raises:
        MoleFileError: As `read_recipe`, and where two jobs have one name.
    """
    values = dict(_plain(path))
    defaults = {f.name: values.pop(f.name) for f in fields(JobSection) if f.name in values}
    jobs = values.get("jobs")
    if isinstance(jobs, Sequence) and not isinstance(jobs, str):
        values["jobs"] = [_over(defaults, job) if isinstance(job, Mapping) else job for job in jobs]
    recipe = _read(path, ManyRecipe, values)
    names = [job.expert.name for job in recipe.jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MoleFileError(printable(path, 300), f"two jobs are called {printable(twice[0])}")
    if not names:
        raise MoleFileError(printable(path, 300), expected="jobs: a list of at least one", got="none")
    return recipe


def _plain(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        place = f" in line {where.line + 1}" if where is not None else ""
        raise MoleFileError(printable(path, 300), f"is not YAML{place}") from error
    if not isinstance(values, Mapping):
        raise MoleFileError(printable(path, 300), expected="keys and values", got=type(values).__name__)
    return values


def _over(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for key, value in own.items():
        before = merged.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[key] = {**before, **value} if both else value  # type: ignore[dict-item]
    return merged


def _read(path: Path, cls: Any, values: Mapping[str, Any]) -> Any:
    wrong: list[str] = []
    recipe = _section(cls, values, "", wrong)
    if wrong:
        text = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        hint = "docs/training.md lists every key"
        raise MoleFileError(printable(path, 300), text, hint=hint)
    return recipe


def _section(cls: Any, values: Any, where: str, wrong: list[str]) -> Any:
    """The dataclass of a mapping; what does not fit goes to `wrong`, and None comes back."""
    if not isinstance(values, Mapping):
        wrong.append(f"{where or 'the file'}: expected keys and values, got {_shown(values)}")
        return None
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    before = len(wrong)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            meant = f", did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            wrong.append(f"{_path(where, key)}: no such key{meant}")
    read = {}
    for name, entry in known.items():
        if name in values:
            read[name] = _value(hints[name], values[name], _path(where, name), wrong)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            wrong.append(f"{_path(where, name)}: is missing")
    if len(wrong) > before:
        return None
    try:
        return cls(**read)
    except MoleError as error:
        wrong.append(f"{where}: {error}")
        return None


def _value(hint: Any, value: Any, where: str, wrong: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where, wrong)
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, where, wrong)
    if origin is Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in args], 1, 0.5)
        meant = f", did you mean {near[0]}?" if near else ""
        wrong.append(f"{where}: expected one of {', '.join(map(str, args))}, got {_shown(value)}{meant}")
        return None
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            wrong.append(f"{where}: expected a list, got {_shown(value)}")
            return None
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(_value(a, v, f"{where}[{i}]", wrong) for i, (a, v) in enumerate(zip(inner, value)))
    return _scalar(hint, value, where, wrong)


def _scalar(hint: Any, value: Any, where: str, wrong: list[str]) -> Any:
    if hint is Path and isinstance(value, str) and value:
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    # YAML reads 1e-4 as a text
    if hint is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint and value != "":
        return value
    names = {Path: "a path", float: "a number", int: "an integer", bool: "true or false", str: "a text"}
    wrong.append(f"{where}: expected {names.get(hint, str(hint))}, got {_shown(value)}")
    return None


def _path(where: str, key: object) -> str:
    return f"{where}.{printable(str(key), 60)}" if where else printable(str(key), 60)


def _shown(value: object) -> str:
    return printable(repr(value), 60)


def chosen(layers: Mapping[str, Any], targets: str | None, where: str) -> dict[str, Any] | None:
    """The layers whose path holds the expression; None for the usual ones.

    Raises:
        MoleValueError: It is no expression, or no path holds it.
    """
    if targets is None:
        return None
    try:
        expression = re.compile(targets)
    except re.error as error:
        got = printable(targets, 100)
        raise MoleValueError(f"{where}: targets", expected="a regular expression", got=got) from error
    matching = {path: layer for path, layer in layers.items() if expression.search(path)}
    if not matching:
        near = ", ".join(list(layers)[:3])
        problem = f"no layer's path holds {printable(targets, 100)}"
        raise MoleValueError(f"{where}: targets", problem, hint=f"paths are like {near}")
    return matching
