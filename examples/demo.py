"""The whole way once: train, inspect, convert, calibrate, fold, export, verify. Everything is written to ``demo/``.

Run by ``make demo``. Fold, export and verify work on the network as it was trained.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import digits
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import normswap

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("demo")
MODEL = ["--model", "examples/digits.py:resnet"]
INPUT = ["--input", "8x1x8x8"]


def step(title: str) -> None:
    print(f"\n# {title}", flush=True)


def command(*arguments: str | Path) -> None:
    """Print and run one ``normswap`` command; a failure ends the demo with its exit status."""
    words = [str(argument) for argument in arguments]
    print("$ normswap", *words, flush=True)
    status = subprocess.run([sys.executable, "-m", "normswap", *words], check=False).returncode
    if status:
        sys.exit(status)


def rebuilt(path: Path) -> torch.nn.Module:
    """The converted network in Python: a fresh one, the recipe that lies beside the checkpoint, the checkpoint."""
    model: torch.nn.Module = digits.resnet()
    for recipe in json.loads(Path(f"{path}.normswap.json").read_text()):
        model = normswap.apply_recipe(model, recipe)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def main() -> None:
    os.chdir(ROOT)
    FOLDER.mkdir(exist_ok=True)
    original, group, folded, exported = (FOLDER / f"digits{end}" for end in (".pt", ".group.pt", ".folded.pt", ".onnx"))
    fitted, unlabelled, page = FOLDER / "digits.fitted.pt", FOLDER / "images.npy", FOLDER / "verification.html"
    drawn = FOLDER / "calibration.html"
    for path in (group, fitted, folded, exported, page, drawn):
        path.unlink(missing_ok=True)
        Path(f"{path}.normswap.json").unlink(missing_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = digits.data()

    step("Train a small residual network on 8 x 8 digits")
    model = digits.train(digits.resnet(), images)
    torch.save(model.state_dict(), original)
    before = digits.accuracy(model, images)
    print(f"wrote {original} (test accuracy {before:.1%})")

    step("What normalizes in it?")
    command("inspect", original, *MODEL)

    step("BatchNorm to GroupNorm: weights copied, then calibrated on 256 images without labels")
    np.save(unlabelled, images.train_images[:256].numpy())
    to = ["--to", "group", "--channels-per-group", "8"]
    command("convert", original, *MODEL, *to, "-o", group)
    calibrated = ["--data", unlabelled, "--refine", "200", "-o", fitted, "--report", drawn]
    command("convert", original, *MODEL, *to, *calibrated)
    table = Table("GroupNorm", "test accuracy")
    table.add_row("before: the BatchNorm network", f"{before:.1%}")
    table.add_row("right after conversion", f"{digits.accuracy(rebuilt(group), images):.1%}")
    table.add_row("calibrated on 256 images, no labels", f"{digits.accuracy(rebuilt(fitted), images):.1%}")
    Console().print(table)

    step("BatchNorm folded into the convolutions, compared with the original before it is written")
    command("fold", original, *MODEL, *INPUT, "-o", folded)

    step("To ONNX, and the judgement of ONNX Runtime")
    command("export", folded, *MODEL, *INPUT, "-o", exported)
    command("verify", original, exported, *MODEL, *INPUT, "--report", page)

    step("Files")
    for path in sorted(FOLDER.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
