"""A SELMA run on disk: what it is made of, and what each stage was told, so that every stage can go on where
it stopped.

root/manifest.json             format, the skills in order, with their seeds
root/<skill>/manifest.json     for each stage its settings and, once it is done, its figures
root/<skill>/requests.jsonl    stage 1: every request with what came of it
root/<skill>/prompts.jsonl     stage 1: the accepted prompts
root/<skill>/pictures/         stage 2: 000000.png … and metadata.jsonl, a picture folder as Hugging Face's
datasets has it
root/<skill>/pictures_flagged/  what a safety checker took out
root/<skill>/run/              stage 3: checkpoints
root/<skill>/expert.safetensors
root/merged.safetensors        stage 4
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, printable
from mole_kernels.files.text import read_json_file, read_text, text_lines
from mole_kernels.files.writer import atomic_write, write_json
from mole_kernels.methods.selma.skills import Skill

FORMAT = "mole-kernels-selma-1"
STAGES = ("prompts", "pictures", "train")


class Project:
    """The folder of one run. Files are written whole or not at all, so that whatever is there can be gone on
    from.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def skills(self) -> dict[str, Skill]:
        """The skills by name, in the order they came in; {} for a folder that holds no run yet."""
        path = self.root / "manifest.json"
        saved = _read_manifest(path).get("skills", {})
        for name, entry in saved.items():
            if not (isinstance(entry, dict) and isinstance(entry.get("about"), str)):
                raise MoleFileError(
                    f"{printable(path, 300)}, skills.{printable(name)}",
                    expected='{"seeds": [three prompts], "about": "…"}',
                    got=printable(entry),
                )
        try:
            return {
                name: Skill(name, entry.get("seeds", ()), entry["about"], entry.get("rules", ()))
                for name, entry in saved.items()
            }
        except MoleValueError as error:
            raise MoleFileError(f"{printable(path, 300)}, skills", str(error)) from error

    def add_skills(self, skills: Iterable[Skill]) -> None:
        """Notes skills; one that is there with other seeds is a MoleStateError and nothing is written."""
        known = self.skills()
        for skill in skills:
            if known.setdefault(skill.name, skill).seeds != skill.seeds:
                hint = "take another name for the skill, or another folder"
                raise MoleStateError(
                    f"{self.root}: skill {skill.name}", "is there already with other seeds", hint=hint
                )
        self.root.mkdir(parents=True, exist_ok=True)
        table = {
            name: {"seeds": list(skill.seeds), "about": skill.about, "rules": list(skill.rules)}
            for name, skill in known.items()
        }
        write_json(self.root / "manifest.json", {"format": FORMAT, "skills": table})

    def choose(self, names: Iterable[str] = ()) -> list[str]:
        """The named skills, or all; one that is not there is a MoleValueError, and so is none at all."""
        known, names = list(self.skills()), list(names)
        if not known:
            raise MoleStateError(
                str(self.root), "holds no skills yet", hint="begin with: mole-kernels selma prompts"
            )
        for name in names:
            if name not in known:
                raise MoleValueError(
                    f"{self.root}: skill", expected=f"one of {', '.join(known)}", got=repr(printable(name))
                )
        return names or known

    def folder(self, skill: str) -> Path:
        return self.root / skill

    def prompts_file(self, skill: str) -> Path:
        return self.root / skill / "prompts.jsonl"

    def prompts(self, skill: str) -> list[str]:
        """The accepted prompts of a skill; none is a MoleStateError."""
        path = self.prompts_file(skill)
        prompts = [
            checked(row, path, number, prompt=str)["prompt"] for number, row in enumerate(read_lines(path), 1)
        ]
        if not prompts:
            hint = "run the first stage: mole-kernels selma prompts"
            raise MoleStateError(f"{self.root}: skill {skill}", "has no prompts", hint=hint)
        return prompts

    def pictures_folder(self, skill: str) -> Path:
        return self.root / skill / "pictures"

    def run_folder(self, skill: str) -> Path:
        return self.root / skill / "run"

    def expert_file(self, skill: str) -> Path:
        return self.root / skill / "expert.safetensors"

    @property
    def merged_file(self) -> Path:
        return self.root / "merged.safetensors"

    def settle(self, stage: str, skill: str, settings: Mapping[str, Any], free: Iterable[str] = ()) -> None:
        """Notes a stage's settings the first time; later ones that differ, but for those in `free`, are a
        MoleStateError.
        """
        plain = json.loads(json.dumps(dict(settings)))
        stages = self._stages(skill)
        saved = stages.get(stage, {}).get("settings")
        for key in sorted({*(saved or {}), *plain} - set(free)) if saved is not None else ():
            if saved.get(key) != plain.get(key):
                hint = f"go on with what the stage began with, or take {skill}'s files away"
                where = f"{self.root}: {stage} of {skill}, {key}"
                raise MoleStateError(
                    where, expected=f"{saved.get(key)!r} as before", got=repr(plain.get(key)), hint=hint
                )
        self.folder(skill).mkdir(parents=True, exist_ok=True)
        entry = stages.get(stage, {}) | {"settings": plain}
        write_json(self.folder(skill) / "manifest.json", stages | {"format": FORMAT, stage: entry})

    def note(self, stage: str, skill: str, figures: Mapping[str, Any]) -> None:
        """What came of a stage."""
        stages = self._stages(skill)
        entry = stages.get(stage, {}) | {"done": dict(figures)}
        write_json(self.folder(skill) / "manifest.json", stages | {"format": FORMAT, stage: entry})

    def noted(self, stage: str, skill: str) -> dict[str, Any] | None:
        """The figures of a stage that is done, else None."""
        return self._stages(skill).get(stage, {}).get("done")

    def _stages(self, skill: str) -> dict[str, Any]:
        """{stage: {"settings": {…}, "done": {…}}} of a skill's manifest; either may be missing."""
        path = self.folder(skill) / "manifest.json"
        stages = _read_manifest(path)
        for stage in STAGES:
            for key in ("settings", "done"):
                value = stages.get(stage, {}).get(key, {})
                if not isinstance(value, dict):
                    raise MoleFileError(
                        f"{printable(path, 300)}, {stage}.{key}", expected="an object", got=printable(value)
                    )
        return stages


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; [] where there is none."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(text_lines(read_text(path)), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise MoleFileError(
                f"{printable(path, 300)}, line {number}", expected="a JSON object", got=printable(line)
            )
        rows.append(row)
    return rows


def checked(row: dict[str, Any], path: Path, number: int, **kinds: type) -> dict[str, Any]:
    """The row, if it has these entries of these types; else a MoleFileError that names the line."""
    wrong = [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]
    if wrong:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise MoleFileError(f"{printable(path, 300)}, line {number}", expected=expected, got=printable(row))
    return row


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Objects as a .jsonl file, replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    atomic_write(path, write)


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, {} where there is none."""
    if not path.exists():
        return {}
    manifest = read_json_file(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise MoleFileError(
            printable(path, 300), expected=f"a manifest of the format {FORMAT}", got="something else"
        )
    for name, entry in manifest.items():
        if name != "format" and not isinstance(entry, dict):
            raise MoleFileError(
                f"{printable(path, 300)}, {printable(name)}", expected="an object", got=printable(entry)
            )
    return manifest
