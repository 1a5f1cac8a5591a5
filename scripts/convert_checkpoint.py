"""Write checkpoints of metarun 0.1 and of earlier 0.2 anew, in the format of today.

    python scripts/convert_checkpoint.py outputs/train/mine/checkpoints/*.pt

Each file gets a neighbour that ends in `.safetensors`; the old one stays. A run directory of which
all checkpoints are converted can be evaluated, and resumed if its config still fits.

Older checkpoints are pickles. `torch.load(weights_only=True)` runs no code from them, but a hostile
one may still take any amount of memory: convert your own files only.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from metarun.components.outer_opt.base import IMPLEMENTATION
from metarun.rundir import checkpoint
from metarun.rundir.checkpoint_files import SUFFIX
from metarun.system.files import write_atomically


def main() -> None:
    """Convert the files that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="+")
    for path in parser.parse_args().file:
        written = path.with_suffix(SUFFIX)
        if written.exists():
            parser.error(f"{written} is there already: move it away first")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            data = checkpoint.to_bytes(of_today(content))
            write_atomically(written, lambda file, data=data: file.write(data), checkpoint.load)
        except Exception as error:  # what rubbish provokes in torch, or lacks, has many types
            parser.error(f"{path} is no checkpoint of metarun ({type(error).__name__}: {error})")
        print(f"{path} -> {written}")


def of_today(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of an old checkpoint as a new one has them."""
    if content.get("format") != checkpoint.FORMAT:
        raise ValueError("it does not say that it is one")
    best, rows, optimizer = content["best"], content["recent"], content["outer_optimizer"]
    later = {
        "skipped": 0,
        "top": [] if best is None else [best],
        "buffers": {},
        "frozen": {},
        "planned_for": content["config"]["trainer"]["steps"],
    }
    recent: dict[str, Any] = {}
    if len(rows):
        rows = torch.stack(list(rows))
        loss, score, norm = rows[:, :3].T
        recent = {"loss": loss, "score": score, "gradient_norm": norm}
        recent |= {"inner_losses": rows[:, 3:], "own": {}}
    groups = [group | IMPLEMENTATION for group in optimizer["param_groups"]]
    now = {
        "version": checkpoint.VERSION,
        "recent": recent,
        "outer_optimizer": optimizer | {"param_groups": groups},
    }
    return later | content | now


if __name__ == "__main__":
    main()
