"""Images in the forms that users have them in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from featup.errors import ImageError
from featup.images import as_images
from tests.featup.support import images

PIXELS = images(5, 7)[0]


def one(image: Any) -> Tensor:
    singles, batched = as_images(image)
    assert not batched
    assert singles[0].dtype == torch.uint8
    return singles[0]


@pytest.mark.parametrize("form", ["path", "str", "pil", "numpy", "read-only numpy", "flipped numpy", "hwc", "chw"])
def test_one_image_in_every_form(form: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    array = PIXELS.numpy()
    Image.fromarray(array).save(path)
    frozen = array.copy()
    frozen.flags.writeable = False
    forms = {
        "path": path,
        "str": str(path),
        "pil": Image.fromarray(array),
        "numpy": array,
        "read-only numpy": frozen,
        "flipped numpy": array[::-1].copy()[::-1],
        "hwc": PIXELS,
        "chw": PIXELS.permute(2, 0, 1),
    }
    assert torch.equal(one(forms[form]), PIXELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_is_from_0_to_1(dtype: torch.dtype) -> None:
    given = (PIXELS.double() / 255).to(dtype)
    tolerance = 1 if dtype == torch.bfloat16 else 0
    assert (one(given.permute(2, 0, 1)).int() - PIXELS.int()).abs().max() <= tolerance
    assert (one(given).int() - PIXELS.int()).abs().max() <= tolerance


def test_batches_are_told_from_single_images() -> None:
    batch = images(5, 7, batch=2)
    for given in (batch, batch.permute(0, 3, 1, 2), batch.numpy(), list(batch), (batch[0], batch[1].numpy())):
        singles, batched = as_images(given)  # type: ignore[arg-type]
        assert batched
        assert torch.equal(torch.stack(singles), batch)
    assert as_images([PIXELS])[1]
    assert as_images(PIXELS[None])[1]
    assert [tuple(image.shape) for image in as_images([PIXELS, PIXELS[:4, :2]])[0]] == [(5, 7, 3), (4, 2, 3)]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (torch.zeros(3, 8, 3), r"\[3, 8, 3\] has 3 values on two axes.* resize .* PIL"),
        (torch.zeros(2, 3, 8, 3), r"\[2, 3, 8, 3\] has 3 values on two axes"),
        (torch.zeros(8, 8), r"\[8, 8\] is no image.*convert\('RGB'\)"),
        (torch.zeros(8, 8, 4), r"\[8, 8, 4\] is no image"),
        (torch.zeros(1, 1, 3, 8, 8), r"is no image"),
        (torch.zeros(0, 8, 3), "holds no pixels"),
        (torch.zeros(8, 8, 3, dtype=torch.int64), "pixels of type int64 .* give uint8"),
        (np.zeros((8, 8, 3), np.uint16), "pixels of type uint16"),
        (np.zeros((8, 8, 3), bool), "pixels of type bool"),
        (np.zeros((8, 8, 3), complex), r"cannot read an image from a ndarray \[8, 8, 3\] of complex128; give a path"),
        (torch.full((8, 8, 3), -1.5), "found -1.5 to -1.5. Likely: images that are normalised"),
        (torch.full((8, 8, 3), 200.0), "found 200 to 200. Likely: pixels from 0 to 255; divide"),
        (torch.full((8, 8, 3), float("nan")), "found nan to nan. Likely: .* not finite"),
        ([], "list of images is empty"),
        ([images(4, 5)], r"item 0 of the list is a batch itself, a Tensor \[1, 4, 5, 3\]"),
        (7, "cannot read an image from a int"),
        ("https://example.org/a.png", "is a URL; download it"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_cure(given: Any, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        as_images(given)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        as_images(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        as_images(tmp_path)
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(ImageError, match=r"text\.png is no image that Pillow reads"):
        as_images(text)
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    Image.fromarray(images(64, 64)[0].numpy()).save(whole)
    cut.write_bytes(whole.read_bytes()[:6000])
    with pytest.raises(ImageError, match=r"cut\.png is damaged"):
        as_images(cut)


def test_every_mode_becomes_rgb() -> None:
    grey = Image.fromarray(PIXELS[..., 0].numpy())
    assert torch.equal(one(grey), PIXELS[..., :1].expand(5, 7, 3))
    assert one(grey.convert("1")).unique().tolist() == [0, 255]
    colours = Image.new("P", (7, 5))
    colours.putpalette([10, 20, 30])
    assert torch.equal(one(colours), torch.tensor([10, 20, 30], dtype=torch.uint8).expand(5, 7, 3))
    deep = Image.fromarray(np.full((5, 7), 65535, np.uint16))
    assert one(deep).unique().tolist() == [255]
    half = Image.new("RGBA", (7, 5), (0, 0, 0, 128))
    assert one(half).unique().tolist() == [127], "half transparent black over white"
    with pytest.raises(ImageError, match=r"32-bit pixels \(mode F\)"):
        as_images(Image.new("F", (7, 5)))


def test_exif_rotation_is_applied_to_files_and_pil_images(tmp_path: Path) -> None:
    path = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    source = Image.fromarray(images(16, 24)[0].numpy())
    source.save(path, exif=exif, quality=95)
    stored = torch.from_numpy(np.array(Image.open(path)))
    assert torch.equal(one(path), stored.rot90(-1))
    assert torch.equal(one(Image.open(path)), stored.rot90(-1))
