"""Writes a trained model as ONNX or as a program of torch.export, checked against PyTorch.

`python -m tracknet.scripts.export --checkpoint DIR --output NEWDIR [--format onnx|torch]`. The ONNX folder takes the place of a checkpoint
in `tracknet.scripts.predict` and `BallTracker`; the other is read by `torch.export.load("NEWDIR/model.pt2").module()(frames, background)`.
Exit codes: 0 done, 1 failure, 2 configuration, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tracknet.scripts.command import Parser, print_result, run_command

EPILOG = """\
NEWDIR holds config.json, README.md (if the checkpoint has one), export.json and
  onnx   model.onnx: NEWDIR takes the place of a checkpoint in tracknet.scripts.predict and BallTracker
  torch  model.pt2, read by: torch.export.load("NEWDIR/model.pt2").module()(frames, background)
Inputs are frames uint8 (B, T, 3, H, W) and, where the model has one, background uint8 (B, 3, H, W), RGB, any B;
T, H and W are the model's, see export.json. The output is float32 logits (B, T, h, w)."""


def build_parser() -> argparse.ArgumentParser:
    """All options of the export."""
    parser = Parser(
        prog="python -m tracknet.scripts.export",
        description="Write a trained model as one file that runs without this package, checked against PyTorch within 1e-4.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="folder with config.json and model.safetensors")
    parser.add_argument("--output", required=True, type=Path, metavar="NEWDIR", help="folder to make")
    parser.add_argument("--format", default="onnx", choices=("onnx", "torch"), help="default: onnx")
    return parser


def export(argv: Sequence[str]) -> None:
    """Exports and says how far the file is from PyTorch."""
    arguments = build_parser().parse_args(argv)
    from tracknet.inference.export import ALLOWED_DIFFERENCE, export_model  # here, because torch takes seconds that --help need not

    done = export_model(arguments.checkpoint, arguments.output, arguments.format)
    difference = f"largest difference of a logit from PyTorch {done.largest_difference:.1e} (allowed {ALLOWED_DIFFERENCE:.0e})"
    print_result(f"{done.file}: {difference}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    return run_command(partial(export, sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
