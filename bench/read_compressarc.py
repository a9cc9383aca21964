"""Which public evaluation tasks CompressARC's published run solved, read from the pictures in its repository.

    pip install pypdf
    python bench/read_compressarc.py CLONE --out bench/results/solve/compressarc-published.json

Its predictions are not in the repository, but a picture of each task's two guesses after the last step is, two pixels a
cell: they are compared with the answers cell by cell. A task counts as solved where each of its inputs is.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
from pathlib import Path

import numpy as np
from pypdf import PdfReader

from qwen_fused.arc.episodes import load_tasks

PICTURES = "results_for_the_blog_post/plots_evaluation"
# what its visualization.py draws a colour with
COLORS = np.array([
    [0, 0, 0], [30, 147, 255], [249, 60, 49], [79, 204, 48], [255, 220, 0],
    [153, 153, 153], [229, 58, 163], [255, 133, 27], [135, 216, 241], [146, 18, 49],
])  # fmt: skip
# of a picture's four columns: a sample, the samples' average, and these
GUESSES = (2, 3)


def picture(clone: Path, task: str) -> np.ndarray:
    """Pixels [rows, columns, 3] of a task's guesses."""
    path = f"HEAD:{PICTURES}/{task}_solutions.pdf"
    file = subprocess.run(["git", "-C", str(clone), "show", path], capture_output=True, check=True).stdout
    (image,) = PdfReader(io.BytesIO(file)).pages[0].images
    # it is stored from below
    return np.array(image.image.convert("RGB"))[::-1]  # type: ignore[union-attr]


def grid_of(block: np.ndarray) -> np.ndarray:
    """The grid in a block of pixels that is white besides."""
    rows, columns = (np.flatnonzero((block != 255).any(2).any(axis)) for axis in (1, 0))
    cells = block[rows[0] : rows[-1] + 1 : 2, columns[0] : columns[-1] + 1 : 2].astype(int)
    distance = np.abs(cells[:, :, None] - COLORS).sum(-1)
    assert distance.min(-1).max() == 0, "a pixel is of no colour"
    return distance.argmin(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="of github.com/iliao2345/CompressARC, bare or not")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tasks = load_tasks("arc1", "evaluation").tasks
    solved, first = [], []
    for task in tasks:
        pixels = picture(args.clone, task.id)
        height, width = pixels.shape[0] // len(task.test), pixels.shape[1] // 4
        right = []
        for number, pair in enumerate(task.test):
            row = pixels[number * height : (number + 1) * height]
            guesses = [grid_of(row[:, column * width : (column + 1) * width]) for column in GUESSES]
            right.append([np.array_equal(guess, pair.output) for guess in guesses])
        solved += [task.id] * all(any(each) for each in right)
        first += [task.id] * all(each[0] for each in right)
    commit = subprocess.run(["git", "-C", str(args.clone), "rev-parse", "HEAD"], capture_output=True, text=True)
    found = {"commit": commit.stdout.strip(), "tasks": len(tasks), "solved": solved, "first": first}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    hundred = {task.id for task in tasks[::4]}
    print(f"{len(solved)} of {len(tasks)} solved, {len(hundred & set(solved))} of every fourth")


if __name__ == "__main__":
    main()
