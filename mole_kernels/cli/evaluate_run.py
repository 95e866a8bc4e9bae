"""What `mole-kernels evaluate` does. Everything that can be wrong is looked at before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mole_kernels.cli.evaluate import METRICS, EvaluateArgs
from mole_kernels.cli.place import ready_file
from mole_kernels.cli.screen import done, number, out, table
from mole_kernels.cli.training import named
from mole_kernels.errors import MoleValueError
from mole_kernels.files.writer import atomic_write, write_json
from mole_kernels.metrics.distances import Inception, fid, kid
from mole_kernels.metrics.faces import InsightFaceModel, face_similarity
from mole_kernels.metrics.folders import Sample, read_samples, with_texts
from mole_kernels.metrics.models import ClipModel, ImageModel
from mole_kernels.metrics.preference import ImageRewardModel, hps, image_reward, pick_score
from mole_kernels.metrics.result import Result
from mole_kernels.metrics.scores import clip_i, clip_t, dino, diversity
from mole_kernels.metrics.sheet import comparison_page, contact_sheet
from mole_kernels.metrics.statistics import Comparison, compare

Samples = Sequence[Sample]
# metric -> how its model is read
_READERS: Mapping[str, Callable[[str], Any]] = {
    "clip-t": ClipModel.load,
    "clip-i": ClipModel.load,
    "pick-score": ClipModel.load,
    "hps": ClipModel.load,
    "dino": ImageModel.load,
    "diversity": ImageModel.load,
    "face": InsightFaceModel,
    "image-reward": ImageRewardModel,
    "fid": lambda source: _extractor(source),
    "kid": lambda source: _extractor(source),
}
_BY_TEXT: Mapping[str, Callable[..., Result]] = {
    "clip-t": clip_t,
    "pick-score": pick_score,
    "hps": hps,
    "image-reward": image_reward,
}
_BY_REFERENCE: Mapping[str, Callable[..., Result]] = {
    "clip-i": clip_i,
    "dino": dino,
    "face": face_similarity,
    "fid": fid,
    "kid": kid,
}


def evaluate(asked: EvaluateArgs) -> None:
    """Measure, print, and write what was asked for."""
    models = named(asked.metric, "--metric", "METRIC=MODEL, as in clip-t=path/to/clip")
    if unknown := [name for name in models if name not in METRICS]:
        raise MoleValueError("--metric", expected=f"one of {', '.join(METRICS)}", got=unknown[0])
    sets = {"pictures": read_samples(asked.folder)}
    for name, folder in named(asked.against or [], "--against", "NAME=FOLDER").items():
        if name in sets:
            raise MoleValueError("--against", expected="another name than pictures", got=name)
        sets[name] = read_samples(folder)
    references = None if asked.reference is None else read_samples(asked.reference)
    _check(models, sets, references)
    for path in (asked.out, asked.html, asked.sheet):
        if path is not None:
            ready_file(path)
    loaded = {(_READERS[m], source): None for m, source in models.items()}
    for key in loaded:
        loaded[key] = key[0](key[1])
    results = {
        name: [
            _measure(metric, samples, references, loaded[_READERS[metric], source], asked.seed)
            for metric, source in models.items()
        ]
        for name, samples in sets.items()
    }
    comparisons = _comparisons(results, sets, asked.seed)
    _write(asked, sets, results, comparisons)
    if asked.json:
        print(json.dumps(_plain(results, comparisons), indent=1))
    else:
        _show(results, comparisons)


def _check(models: Mapping[str, str], sets: Mapping[str, Samples], references: Samples | None) -> None:
    first = sets["pictures"]
    for name, samples in sets.items():
        if [s.text for s in samples] != [s.text for s in first]:
            raise MoleValueError(
                f"--against {name}",
                expected="pictures of the same prompts in the same order",
                got=f"{len(samples)} pictures, beside {len(first)}",
                hint="draw both sets from one list of prompts and seeds",
            )
    for metric in models:
        if metric in _BY_TEXT:
            for samples in sets.values():
                with_texts(samples, metric)
        if metric in _BY_REFERENCE and references is None:
            raise MoleValueError(
                f"--metric {metric}", expected="--reference, a folder of pictures to compare with", got="none"
            )


def _extractor(source: str) -> Any:
    return Inception(source) if source.endswith((".pth", ".pt")) else ImageModel.load(source)


def _measure(metric: str, samples: Samples, references: Samples | None, model: Any, seed: int) -> Result:
    if metric in _BY_TEXT:
        return _BY_TEXT[metric](samples, model)
    if metric == "diversity":
        return diversity(samples, model)
    if metric == "kid":
        return kid(samples, references or (), model, seed=seed)
    return _BY_REFERENCE[metric](samples, references, model)


def _comparisons(
    results: Mapping[str, Sequence[Result]], sets: Mapping[str, Samples], seed: int
) -> dict[str, list[Comparison]]:
    first = results["pictures"]
    return {
        name: [compare(a, b, seed=seed) for a, b in zip(first, results[name]) if a.by_picture]
        for name in sets
        if name != "pictures"
    }


def _plain(
    results: Mapping[str, Sequence[Result]], comparisons: Mapping[str, Sequence[Comparison]]
) -> dict[str, Any]:
    return {
        "results": {name: [result.row() for result in own] for name, own in results.items()},
        "against": {
            name: [asdict(pair) | {"sure": pair.sure} for pair in own] for name, own in comparisons.items()
        },
    }


def _write(
    asked: EvaluateArgs,
    sets: Mapping[str, Samples],
    results: Mapping[str, Sequence[Result]],
    comparisons: Mapping[str, Sequence[Comparison]],
) -> None:
    written: list[Path] = []
    if asked.out is not None:
        write_json(asked.out, _plain(results, comparisons))
        written.append(asked.out)
    if asked.html is not None:
        text = comparison_page("Pictures measured", sets, results, comparisons).encode()
        atomic_write(asked.html, lambda file: file.write(text))  # type: ignore[arg-type, return-value]
        written.append(asked.html)
    if asked.sheet is not None:
        image = contact_sheet(sets)
        atomic_write(asked.sheet, lambda file: image.save(file, "PNG"))
        written.append(asked.sheet)
    for path in written if not asked.json else ():
        done(str(path), "written")


def _show(results: Mapping[str, Sequence[Result]], comparisons: Mapping[str, Sequence[Comparison]]) -> None:
    metrics = [f"{r.metric} {'↑' if r.better == 'higher' else '↓'}" for r in results["pictures"]]
    rows = [(name, *(number(r.value) for r in own)) for name, own in results.items()]
    out().print(table("figures", ["", *metrics], rows, metrics))
    for name, own in comparisons.items():
        shown = [
            (c.metric, f"{c.difference:+.4g}", f"{c.low:+.4g} … {c.high:+.4g}", f"{100 * c.wins:.0f} %")
            for c in own
        ]
        out().print(table(f"pictures against {name}", ["metric", "difference", "95 %", "wins"], shown))
    seen = {(r.metric, r.model, r.revision): None for own in results.values() for r in own}
    out().print(table("measured by", ["metric", "model", "revision"], list(seen)))
