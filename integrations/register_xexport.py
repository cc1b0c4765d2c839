"""``optimum-cli export xexport``: the exporter as a command of Hugging Face's optimum.

The wheel puts this file at ``optimum/commands/register/register_xexport.py``, since optimum looks
for commands in that namespace (PEP 420), where every distribution may put files of its own. It
lies in a folder without ``__init__.py``, as optimum asks, for an editable install to show that folder.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

__all__ = ["REGISTER_COMMANDS", "XexportCommand"]


class XexportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Hands its arguments to ``xexport export``."""

    COMMAND = CommandInfo(
        name="xexport", help="Export a sequence model to a streaming ONNX bundle (xexport)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The options of ``xexport export`` that matter for a checkpoint; ``xexport`` itself has them all."""
        parser.add_argument("-m", "--model", required=True, help="A family, or the path of a checkpoint.")
        parser.add_argument(
            "--target", required=True, help="Where it is to run; `xexport targets` lists them."
        )
        parser.add_argument("--weights", help="A checkpoint, where --model is a family.")
        parser.add_argument("--preset", help="A size of the family with random weights.")
        parser.add_argument("--tokenizer", help="bytes, none, rwkv-world, or the path of one.")
        parser.add_argument("--force", action="store_true", help="Replace the folder if it exists.")
        parser.add_argument("output", help="The folder to write.")

    def run(self) -> None:
        """Export."""
        from xexport.cli import cli

        given = self.args
        arguments = ["export", given.model, "--target", given.target, "--out", given.output]
        for option in ("weights", "preset", "tokenizer"):
            if getattr(given, option):
                arguments += [f"--{option}", getattr(given, option)]
        if given.force:
            arguments.append("--force")
        cli(arguments, prog_name="optimum-cli")


REGISTER_COMMANDS = [(XexportCommand, ExportCommand)]
