"""Image folders as batches: what is done to an image, in which order, and what cannot be read."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import tests.zoo.schemas  # noqa: F401  before torchvision
from normswap import NormswapError
from normswap.data import load_batches, parse_preparation
from normswap.images import ImageFolder, Preparation, prepared

Image = pytest.importorskip("PIL.Image")
transforms = pytest.importorskip("torchvision.transforms")

SMALL = Preparation(size=(12, 16), resize=20)


def save(path: Path, height: int, width: int, seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes and one image beside them; and what is no image."""
    for place, name in enumerate(("cat/b.png", "cat/a.png", "dog/c.bmp", "zebra.png", "dog/D.PNG")):
        save(tmp_path / name, 24, 30 + place, place)
    (tmp_path / "notes.txt").write_text("labels")
    save(tmp_path / ".thumbs" / "x.png", 9, 9)
    return tmp_path


@pytest.mark.parametrize(("height", "width"), [(30, 47), (47, 30), (20, 20), (9, 14)])
def test_as_torchvision_does_it(tmp_path: Path, height: int, width: int) -> None:
    path = save(tmp_path / "a.png", height, width)
    wanted = transforms.Compose(
        [
            transforms.Resize(20),
            transforms.CenterCrop((12, 16)),
            transforms.ToTensor(),
            transforms.Normalize(SMALL.mean, SMALL.std),
        ]
    )(Image.open(path).convert("RGB"))
    found = prepared(path, SMALL)
    assert (found.shape, found.dtype) == ((3, 12, 16), torch.float32)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_batches_in_the_order_of_paths(folder: Path) -> None:
    images = ImageFolder(folder, 2, SMALL)
    names = [path.relative_to(folder).as_posix() for path in images.files]
    assert names == ["cat/a.png", "cat/b.png", "dog/D.PNG", "dog/c.bmp", "zebra.png"]
    assert [len(batch) for batch in images] == [2, 2, 1] == [len(batch) for batch in images]  # a second time
    assert len(images) == 3
    first = next(iter(images))
    assert torch.equal(first[1], prepared(folder / "cat" / "b.png", SMALL))
    assert str(images).startswith(f"5 images of {folder} in 3 batches: RGB, shorter side 20, cropped to 12x16")


def test_read_when_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    batches = iter(ImageFolder(folder, 2, SMALL))
    assert opened == []
    next(batches)
    assert len(opened) == 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_modes_become_colour(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}", 24, 30, mode=mode)
    assert prepared(path, SMALL).shape == (3, 12, 16)


def test_grey_and_sixteen_bits(tmp_path: Path) -> None:
    grey = Preparation(size=(8, 8), resize=8, mean=(0.0,), std=(1.0,))
    path = tmp_path / "deep.png"
    Image.fromarray(numpy.full((8, 8), 51400, dtype=numpy.uint16)).save(path)
    found = prepared(path, grey)
    assert found.shape == (1, 8, 8)
    assert torch.allclose(found, torch.full((1, 8, 8), 200 / 255))


def test_turned_as_exif_says(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 20, 20)
    upright = prepared(path, SMALL)
    exif = Image.Exif()
    exif[274] = 3  # upside down
    Image.open(path).rotate(180).save(tmp_path / "b.png", exif=exif)
    assert torch.equal(prepared(tmp_path / "b.png", SMALL), upright)


def test_defaults_are_those_of_imagenet_models() -> None:
    assert str(Preparation()) == (
        "RGB, shorter side 256, cropped to 224x224 in the middle, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"
    )
    assert Preparation(size=(112, 112)).shorter == 128
    assert Preparation(size=(100, 300)).shorter == 300


def test_what_cannot_be_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cat" / "c.png").write_bytes(b"no image")
    with pytest.raises(NormswapError, match=r"c\.png cannot be read as an image: cannot identify"):
        list(ImageFolder(folder, 2, SMALL))
    truncated = folder / "cat" / "c.png"
    truncated.write_bytes((folder / "cat" / "b.png").read_bytes()[:900])
    with pytest.raises(NormswapError, match=r"c\.png cannot be read as an image"):
        list(ImageFolder(folder, 2, SMALL))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NormswapError, match="no images in it; these are read: "):
        ImageFolder(tmp_path / "empty", 2)
    with pytest.raises(NormswapError, match="a batch of 0 images"):
        ImageFolder(folder, 0)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NormswapError, match=r"pip install 'normswap\[images\]'"):
        ImageFolder(folder, 2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"size": (0, 3)}, "an image size of"),
        ({"size": (64, 64), "resize": 32}, "resize to 64 or more"),
        ({"mean": (0.5,)}, "three numbers each for colour or one for grey"),
        ({"std": (0.2, 0.2, 0.0)}, "std above 0"),
    ],
)
def test_preparations_that_make_no_sense(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(NormswapError, match=told):
        Preparation(**arguments)


def test_options() -> None:
    assert parse_preparation(None, None, None, None) is None
    assert parse_preparation("12x16", 20, None, None) == SMALL
    assert parse_preparation("8", None, "0.5", "0.25") == Preparation((8, 8), None, (0.5,), (0.25,))
    for arguments, told in (
        (("8x8x3", None, None, None), "--image-size"),
        ((None, None, "a,b,c", None), "--image-mean"),
    ):
        with pytest.raises(NormswapError, match=told):
            parse_preparation(*arguments)


def test_as_data(folder: Path, tmp_path: Path) -> None:
    batches = load_batches(str(folder), 3, SMALL)
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 12, 16), (2, 3, 12, 16)]
    numpy.save(tmp_path / "x.npy", numpy.zeros((2, 3), dtype=numpy.float32))
    with pytest.raises(NormswapError, match="is no folder of images"):
        load_batches(str(tmp_path / "x.npy"), 3, SMALL)
    first: list[Tensor] = list(load_batches(str(folder), 8))
    assert first[0].shape == (5, 3, 224, 224)
