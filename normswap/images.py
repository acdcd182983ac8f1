"""Batches from a folder of images.

Every image under the folder counts, in class subfolders or flat, in the order of their paths. Each is turned as its
EXIF says, made RGB (or grey, for one mean), resized so that its shorter side is ``resize``, cropped to ``size`` in the
middle, divided by 255, and normalized. Without other words this is what ImageNet models expect, as in torchvision's
reference: 256, 224, and the mean and deviation of ImageNet. Images are read when their batch is asked for, so that a
folder may be larger than memory. Pillow reads them; it is the extra ``images``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from normswap.errors import NormswapError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
RATIO = 224 / 256
"""Of the crop to the resized shorter side, where only the crop is given."""


@dataclass(frozen=True)
class Preparation:
    """What is done to each image.

    Raises :class:`NormswapError` for sizes below 1, a crop larger than what is resized to, and means and deviations
    that do not fit."""

    size: tuple[int, int] = (224, 224)
    """Height and width of the crop."""
    resize: int | None = None
    """The shorter side before it; ``None`` for the crop's shorter side divided by 224/256, at least its longer one."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel, of values in [0, 1]; three for colour, one for grey."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise NormswapError(f"an image size of {self.size}: it must be a height and a width of at least 1")
        if self.shorter < max(self.size):
            raise NormswapError(
                f"images resized to {self.shorter} pixels on the shorter side cannot all be cropped to "
                f"{self.size[0]}x{self.size[1]}: resize to {max(self.size)} or more"
            )
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise NormswapError(
                f"mean {self.mean} and std {self.std}: give three numbers each for colour or one for grey, std above 0"
            )

    @property
    def shorter(self) -> int:
        return max(round(min(self.size) / RATIO), max(self.size)) if self.resize is None else self.resize

    def __str__(self) -> str:
        colour = "RGB" if len(self.mean) == 3 else "grey"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{colour}, shorter side {self.shorter}, cropped to {self.size[0]}x{self.size[1]} in the middle, "
            f"mean {mean}, std {std}"
        )


class ImageFolder:
    """An iterable of batches ``(n, channels, height, width)`` in float32; each time it is gone over, the files are read
    again.

    Raises :class:`NormswapError` for a folder without images, without Pillow, and, when it is come to, for a file that
    cannot be read."""

    def __init__(self, folder: str | os.PathLike[str], batch_size: int, preparation: Preparation | None = None) -> None:
        if batch_size < 1:
            raise NormswapError(f"a batch of {batch_size} images: it must be at least 1")
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.preparation = preparation or Preparation()
        _pillow()
        found = (path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        visible = (path for path in found if not any(p.startswith(".") for p in path.relative_to(self.folder).parts))
        self.files = sorted(path for path in visible if path.is_file())
        if not self.files:
            raise NormswapError(f"{self.folder}: no images in it; these are read: {', '.join(sorted(SUFFIXES))}")

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.files), self.batch_size):
            yield torch.stack([self._read(path) for path in self.files[first : first + self.batch_size]])

    def __str__(self) -> str:
        return f"{len(self.files)} images of {self.folder} in {len(self)} batches: {self.preparation}"

    def _read(self, path: Path) -> Tensor:
        try:
            return prepared(path, self.preparation)
        except Exception as error:
            raise NormswapError(f"{path} cannot be read as an image: {error or type(error).__name__}") from error


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise NormswapError("images are read with Pillow: pip install 'normswap[images]'") from error
    return PIL


def prepared(path: str | os.PathLike[str], preparation: Preparation) -> Tensor:
    """One image as ``(channels, height, width)`` in float32. Raises what Pillow raises."""
    pillow = _pillow()
    height, width = preparation.size
    channels = len(preparation.mean)
    with pillow.Image.open(path) as opened:
        image = pillow.ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits a value; convert() would clip them
            image = pillow.Image.fromarray((numpy.asarray(image, dtype=numpy.float64) / 257).round().astype("uint8"))
        image = image.convert("RGB" if channels == 3 else "L")
    factor = preparation.shorter / min(image.size)
    resized = [max(preparation.shorter, int(side * factor)) for side in image.size]  # cut off, as torchvision does
    image = image.resize(resized, pillow.Image.Resampling.BILINEAR)
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    pixels = numpy.asarray(image.crop((left, top, left + width, top + height)), dtype=numpy.float32)
    values = torch.from_numpy(pixels / 255).reshape(height, width, channels).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (preparation.mean, preparation.std))
    return (values - mean) / std
