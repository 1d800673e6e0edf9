"""Labels of public data sets, from their original downloads to what ``featup pack --label-dir`` takes; see datasets.md.

python docs/convert_labels.py ade150 ADEChallengeData2016/annotations/training masks/ade/training
python docs/convert_labels.py nyuv2 nyu_depth_v2_labeled.mat splits.mat nyuv2/
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["RECIPES", "Recipe", "class_table", "convert_folder", "main", "write_depth_frames"]

NO_CLASS = 255
Table = NDArray[np.uint8]


@dataclass(frozen=True)
class Recipe:
    """How one data set's label files are converted.

    Attributes:
        table: The class id of each of 256 original ids; 255 for no class.
        classes: K, for ``--classes``.
        ending: Of the names of the label files.
        image_ending: What takes its place in the names of the images, without their extension.
    """

    table: Table
    classes: int
    ending: str = ".png"
    image_ending: str = ""


def class_table(classes: dict[int, int]) -> Table:
    """A table of 256 entries; ids that are not among ``classes`` have no class."""
    table = np.full(256, NO_CLASS, np.uint8)
    for original, ours in classes.items():
        table[original] = ours
    return table


# The 19 classes of Cityscapes' evaluation, in its order of train ids.
_CITYSCAPES_19 = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# COCO-Stuff's 27 coarse classes of its 182, as IIC, PiCIE and STEGO number them: things in runs (class, length) ...
_COCO_THINGS = (9, 1), (11, 8), (8, 6), (7, 10), (6, 8), (10, 10), (5, 8), (2, 10), (3, 10), (0, 6), (1, 6), (4, 8)
# ... and the 91 kinds of stuff after them.
_COCO_STUFF = (
    "17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 20 22 "
    "15 17 16 15 22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 "
    "17 22 14 18 18 18 18 18 18 18 26 26 19 19 24"
)
_COCO_27 = [coarse for coarse, length in _COCO_THINGS for _ in range(length)] + [
    int(one) for one in _COCO_STUFF.split()
]

RECIPES = {
    # Id 0 is "other objects": no class among the 150.
    "ade150": Recipe(class_table({original: original - 1 for original in range(1, 151)}), 150),
    "cityscapes19": Recipe(
        class_table({original: ours for ours, original in enumerate(_CITYSCAPES_19)}),
        19,
        "_gtFine_labelIds.png",
        "_leftImg8bit",
    ),
    # All ids from road on, as unsupervised segmentation counts them.
    "cityscapes27": Recipe(
        class_table({original: original - 7 for original in range(7, 34)}), 27, "_gtFine_labelIds.png", "_leftImg8bit"
    ),
    "cocostuff27": Recipe(class_table(dict(enumerate(_COCO_27))), 27),
}


def convert_folder(recipe: Recipe, labels: Path, out: Path) -> int:
    """Write every label file below ``labels`` with the recipe's class ids, by its image's relative name.

    Returns:
        How many were written.

    Raises:
        ValueError: a label that is not one number a pixel, or no label at all.
    """
    count = 0
    for file in sorted(labels.rglob(f"*{recipe.ending}")):
        with Image.open(file) as image:
            ids = np.asarray(image)
        if ids.ndim != 2 or ids.dtype != np.uint8:
            raise ValueError(f"{file}: {ids.dtype} of shape {ids.shape}; class ids are 8-bit grey or palette PNGs")
        relative = file.relative_to(labels)
        target = out / relative.with_name(relative.name.removesuffix(recipe.ending) + recipe.image_ending + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(recipe.table[ids]).save(target)
        count += 1
    if not count:
        raise ValueError(f"no file *{recipe.ending} below {labels}; give the folder of the original labels")
    return count


def write_depth_frames(images: Any, depths: Any, numbers: NDArray[np.int64], out: Path) -> None:
    """Write some frames of NYUv2's file as ``images/NUMBER.png`` and ``depth/NUMBER.png`` in millimetres.

    Args:
        images: As HDF5 shows them: uint8 ``[N, 3, W, H]``.
        depths: Metres ``[N, W, H]``.
        numbers: Of the frames, from 1.
        out: A folder.
    """
    for folder in ("images", "depth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for number in numbers.tolist():
        metres = np.asarray(depths[number - 1]).T
        Image.fromarray(np.ascontiguousarray(np.asarray(images[number - 1]).T)).save(out / f"images/{number:04d}.png")
        Image.fromarray(np.round(metres * 1000).astype(np.uint16)).save(out / f"depth/{number:04d}.png")


def _convert_nyuv2(labelled: Path, splits: Path, out: Path) -> None:
    import h5py
    import scipy.io

    numbers = scipy.io.loadmat(splits)
    with h5py.File(labelled) as file:
        for split in ("train", "test"):
            write_depth_frames(file["images"], file["depths"], numbers[f"{split}Ndxs"][:, 0].astype(int), out / split)


def main(argv: list[str]) -> int:
    """Run one recipe; exit status 2 with the usage where the arguments are others."""
    commands: dict[str, Callable[[], Any]] = {}
    if len(argv) == 3:
        commands = {
            name: lambda recipe=recipe: convert_folder(recipe, Path(argv[1]), Path(argv[2]))  # type: ignore[misc]
            for name, recipe in RECIPES.items()
        }
    elif len(argv) == 4:
        commands = {"nyuv2": lambda: _convert_nyuv2(*map(Path, argv[1:]))}
    if not argv or argv[0] not in commands:
        print(f"usage: convert_labels.py {{{','.join(RECIPES)}}} LABELS OUT")
        print("       convert_labels.py nyuv2 MAT SPLITS OUT")
        return 2
    commands[argv[0]]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
