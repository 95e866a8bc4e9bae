"""`mole-kernels`: the command line.

    mole-kernels <verb> …                 inspect convert merge compress report fuse evaluate doctor
    explain tune demo mole-kernels train <paper> [stage]    mole edlora mix-of-show selma difflora
    mole-kernels <paper> <stage>          the stages of selma, difflora and mix-of-show that train nothing

Torch and diffusers are imported by the commands that need them, so that `--help` is immediate.
"""

from __future__ import annotations

import sys
import warnings

import typer

from mole_kernels.cli import evaluate, files, machine
from mole_kernels.cli.difflora import difflora
from mole_kernels.cli.grammar import MoleCommand, MoleGroup
from mole_kernels.cli.mix_of_show import mix_of_show
from mole_kernels.cli.screen import show_error, show_warning
from mole_kernels.cli.selma import selma
from mole_kernels.cli.train import many_command, train
from mole_kernels.errors import MoleError, MoleWarning

app = typer.Typer(
    help="Mixtures of low-rank experts in diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    cls=MoleGroup,
)
files.register(app)
app.add_typer(train, name="train")
app.command(name="train-many", cls=MoleCommand)(many_command)
app.add_typer(selma, name="selma")
app.add_typer(difflora, name="difflora")
app.add_typer(mix_of_show, name="mix-of-show")
evaluate.register(app)
machine.register(app)


def main() -> None:
    """The entry point: an error of ours is one or two lines in red and exit code 2, without a traceback."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def showwarning(message, category, *rest, **more):
            if issubclass(category, MoleWarning):
                show_warning(str(message))
            else:
                plain(message, category, *rest, **more)

        warnings.showwarning = showwarning
        try:
            app()
        except MoleError as error:
            show_error(str(error))
            sys.exit(2)


if __name__ == "__main__":
    main()
