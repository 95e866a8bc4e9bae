"""Commands and groups that answer an old spelling with the new one."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mole_kernels.errors import MoleValueError, printable

# an option's old name -> its new one, where a command does not have the old one any more
OPTIONS = {
    "--batch": "--batch-size",
    "--plan": "--dry-run",
    "--gpu": "--device",
    "--pipeline": "--model",
    "--report": "--json > FILE",
    "--precision": "--mixed-precision",
    "--steps": "--sampling-steps",
    "--size": "--resolution",
    "--height": "--resolution HEIGHTxWIDTH",
    "--width": "--resolution HEIGHTxWIDTH",
    "--skills": "--skill-file",
    "--model": "--llm",
    "--kind": "--gate-kind or --endpoint-kind",
    "--expert": "--expert-file or --adapter",
    "--start": "--initial-gates",
    "--most": "--max-pictures",
    "--more": "--per-request",
    "--limit": "--max-rouge",
    "--power": "--error-power",
    "--strength": "--error-weight",
    "--drop": "--cond-dropout",
    "--minimum": "--min-side",
    "--faces": "--face-models",
    "--face": "--face-encoder",
    "--image": "--image-encoder",
    "--memory": "--memory-mb",
    "--target": "--target-module",
    "--file": "--text-file",
    "--key": "--api-key",
    "--alpha": "--concept-scale",
}
# a command's old place -> its new one
COMMANDS = {
    ("selma", "train"): "train selma",
    ("difflora", "train"): "train difflora predictor",
    ("difflora", "train-autoencoder"): "train difflora autoencoder",
}


# typer may bring a click of its own: the error that both mean by it
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class MoleCommand(TyperCommand):
    """A command that names the new spelling of an old option, and of an output given by place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for argument in args:
            name = argument.partition("=")[0]
            new = OPTIONS.get(name)
            if new is not None and name not in own and any(new_name in own for new_name in new.split()):
                here = [word for word in new.split(" or ") if word.split()[0] in own]
                raise MoleValueError(ctx.command_path, f"{name} is now {' or '.join(here)}")
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            if "extra argument" not in _message(error) or "--out" not in own:
                raise
            raise MoleValueError(
                ctx.command_path,
                printable(_message(error), 300).rstrip("."),
                hint="an output is named by --out",
            ) from None


def _message(error: BaseException) -> str:
    return str(getattr(error, "message", error))


class MoleGroup(TyperGroup):
    """A group that names the new place of a command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        new = COMMANDS.get((self.name or "", args[0])) if args else None
        if new is not None:
            raise MoleValueError(ctx.command_path, f"{args[0]} is now: mole-kernels {new}")
        return super().resolve_command(ctx, args)
