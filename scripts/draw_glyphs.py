"""Draw a contact sheet of the embedded dataset "glyphs", for the README."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from metarun.components.data import glyphs

GAP = 2  # pixels around a drawing
MIDDLE = 12  # pixels between the two halves of the sheet
ZOOM = 2
GREYS = 16  # enough for smooth edges, and fewer bytes
MOST_ROWS = len(glyphs.SPLITS["test"])
MOST_COLUMNS = glyphs.CHARACTERS[0]  # every alphabet has as many characters


def contact_sheet(seed: int, rows: int, columns: int) -> Tensor:
    """Dark ink on white, uint8 (height, width), an alphabet of the test split each row.

    The left half shows `columns` characters in the hand of one person; the right half shows
    the second of them as `columns` people drew it.
    """
    images, names = glyphs.draw(seed)
    lines = []
    for number in glyphs.SPLITS["test"][:rows]:
        members = [i for i, name in enumerate(names) if name.startswith(f"alphabet{number:02}/")]
        in_one_hand = images[members[:columns], 0, 0]
        by_many_hands = images[members[1], :columns, 0]
        middle = torch.zeros(glyphs.SIDE + 2 * GAP, MIDDLE, dtype=torch.uint8)
        halves = [_side_by_side(in_one_hand), middle, _side_by_side(by_many_hands)]
        lines.append(torch.cat(halves, dim=1))
    return 255 - torch.cat(lines)


def _side_by_side(drawings: Tensor) -> Tensor:
    """(drawings, 28, 28) in a row, each with a gap around it."""
    return torch.cat(list(torch.nn.functional.pad(drawings, (GAP, GAP, GAP, GAP))), dim=1)


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/glyphs.png"), help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the dataset")
    parser.add_argument("--rows", type=int, default=8, help=f"alphabets, 1 to {MOST_ROWS}")
    parser.add_argument(
        "--columns", type=int, default=8, help=f"drawings in each half, 1 to {MOST_COLUMNS}"
    )
    args = parser.parse_args()
    if not 1 <= args.rows <= MOST_ROWS:
        parser.error(f"--rows is {args.rows}, must be 1 to {MOST_ROWS}")
    if not 1 <= args.columns <= MOST_COLUMNS:
        parser.error(f"--columns is {args.columns}, must be 1 to {MOST_COLUMNS}")
    sheet = Image.fromarray(contact_sheet(args.seed, args.rows, args.columns).numpy())
    sheet = sheet.resize((ZOOM * sheet.width, ZOOM * sheet.height), Image.Resampling.BICUBIC)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(GREYS).save(args.out, optimize=True)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
