"""Images: where they lie, and the pixels a model reads, as its preprocessor_config.json says.

Pixels are (x * factor - mean) / std per channel after resizing, a shorter edge and a centre crop
where the file asks for them. Without that file: straight to the model's image_size, factor 1/255,
mean and std 0.5 (what ViT was trained with). Grey images fill all channels. Nothing is augmented:
a row is always the same pixels.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from compressor.errors import CompressError
from compressor.options import nearest
from compressor.training.documents import Document, Media
from compressor.training.idx import IDX, idx_pixels, read_idx
from compressor.training.preprocessing import damaged
from compressor.training.tables import decode

SUFFIXES = (".png", ".jpg", ".jpeg")
LABELS = "labels.csv"
_HINT = f"give a folder with one subfolder for each class, or with images and {LABELS}"


@dataclass(frozen=True)
class ImagePlan:
    """How an image becomes pixel_values [C, height, width]."""

    height: int
    width: int
    channels: int
    patches: int  # positions of the model's output: one a patch, class, and DeiT's teacher
    resize: tuple[int, int] | int | None  # (height, width), or the shorter edge
    crop: bool
    resample: int
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_plan(config: Any, given: dict[str, Any]) -> ImagePlan:
    """The plan of a model's config and of its preprocessor_config.json ({} without one).

    Raises:
        CompressError: they do not fit together, the file is damaged, or the channels are neither
            grey nor colours.
    """
    try:
        return _plan(config, given)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise damaged(error) from error


def _plan(config: Any, given: dict[str, Any]) -> ImagePlan:
    height, width = _pair(config.image_size)
    patch, channels = _pair(config.patch_size), config.num_channels
    if channels not in (1, 3):
        raise CompressError(
            f"the model reads images of {channels} channels; files have 1 or 3",
            "take a model with num_channels 1 or 3",
        )
    size = given.get("size", config.image_size)
    resize = size.get("shortest_edge") if isinstance(size, dict) else None
    resize = _edge(resize) if resize else _pair(size)
    mean, std = (given.get(key) or [0.5] * channels for key in ("image_mean", "image_std"))
    if not given.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    if len(mean) != channels or len(std) != channels:
        raise CompressError(
            f"preprocessor_config.json normalizes {len(mean)} channels, the model reads {channels}",
            f"write {channels} numbers into image_mean and image_std",
        )
    return ImagePlan(
        height=height,
        width=width,
        channels=channels,
        patches=(height // patch[0]) * (width // patch[1])
        + (2 if config.model_type == "deit" else 1),
        resize=resize if given.get("do_resize", True) else None,
        crop=given.get("do_center_crop", False),
        resample=Image.Resampling(given.get("resample", Image.Resampling.BILINEAR)),
        factor=float(given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1),
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
    )


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        size = size["height"], size["width"]
    high, wide = (size, size) if isinstance(size, int) else size
    return _edge(high), _edge(wide)


def _edge(pixels: Any) -> int:
    if not isinstance(pixels, int) or pixels < 1:
        raise ValueError(f"{pixels!r} is no number of pixels")
    return pixels


@dataclass(frozen=True)
class ImageRows:
    """Every document is a row; pixels are computed when a batch asks for them."""

    documents: Sequence[Document]
    plan: ImagePlan

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions of every row, int64 [R]: all the same."""
        return np.full(len(self), self.plan.patches, np.int64)

    def read(self, members: NDArray[np.int64]) -> dict[str, Tensor]:
        """pixel_values float32 [B, C, H, W], row, document and, where known, labels int64 [B]."""
        chosen = [self.documents[i] for i in members]
        found = {
            "pixel_values": torch.stack([pixels(_open(d), self.plan) for d in chosen]),
            "row": torch.from_numpy(members.copy()),
            "document": torch.from_numpy(members.copy()),
        }
        labels = [d.label for d in chosen if d.label is not None]
        return found | ({"labels": torch.tensor(labels)} if labels else {})


def pixels(image: Image.Image, plan: ImagePlan) -> Tensor:
    """pixel_values float32 [C, H, W] of one image.

    Raises:
        CompressError: the plan leads to another size than the model reads.
    """
    image = image.convert("RGB" if plan.channels == 3 else "L")
    if isinstance(plan.resize, int):
        wide, high = (int(plan.resize * side / min(image.size)) for side in image.size)
        image = image.resize((wide, high), plan.resample)
    elif plan.resize is not None:
        high, wide = plan.resize
        image = image.resize((wide, high), plan.resample)
    if plan.crop:
        left, top = (image.width - plan.width) // 2, (image.height - plan.height) // 2
        image = image.crop((left, top, left + plan.width, top + plan.height))
    if image.size != (plan.width, plan.height):
        raise CompressError(
            f"preprocessor_config.json makes images of {image.width} x {image.height} and the "
            f"model reads {plan.width} x {plan.height}",
            "correct size and crop_size in preprocessor_config.json",
        )
    x_HWC = np.asarray(image, np.float32).reshape(plan.height, plan.width, plan.channels)
    mean_C, std_C = (np.array(values, np.float32) for values in (plan.mean, plan.std))
    scaled = (x_HWC * np.float32(plan.factor) - mean_C) / std_C
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


def read_images(path: Path, classes: dict[str, int] | None = None) -> list[Document]:
    """Documents of a folder of images or of an MNIST idx file with its labels beside it.

    Raises:
        CompressError: no such folder or file, no image in it, half-labelled, or unreadable.
    """
    if path.name.endswith(IDX):
        return read_idx(path)
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is no folder of images" if path.exists() else "does not exist"
        raise CompressError(f"'{path}' {what}{nearest(path.name, siblings)}", _HINT)
    names = class_names(path)
    if names:
        number = _numbers(path, names, classes or {})
        _refuse_other_files([path / name for name in names])
        files = [(file, number[name]) for name in names for file in _files(path / name)]
        if _files(path):
            raise CompressError(
                f"'{path}' has images in subfolders and images without a class", _HINT
            )
    else:
        files = list(_labels_of(path).items())
    if not files:
        raise CompressError(f"'{path}' holds no {', '.join(SUFFIXES)} image", _HINT)
    return [Document(label=label, media=_media(file)) for file, label in files]


def class_names(path: Path) -> list[str]:
    """The classes of a folder: its subfolders, sorted."""
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _numbers(path: Path, names: list[str], classes: dict[str, int]) -> dict[str, int]:
    """{folder: class number}: the model's where it names its classes, else in sorted order."""
    if not classes:
        return {name: i for i, name in enumerate(names)}
    if unknown := [name for name in names if name not in classes]:
        raise CompressError(
            f"'{path.name}' has the class folders {_few(unknown)}, and the model has the classes "
            f"{_few(list(classes))}{nearest(unknown[0], list(classes))}",
            "name the folders as config.json does in id2label, or write images and labels.csv",
        )
    return {name: classes[name] for name in names}


def _refuse_other_files(folders: list[Path]) -> None:
    """A class may be empty, but not because nothing in its folder is an image."""
    for folder in folders:
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others and not _files(folder):
            raise CompressError(
                f"'{folder}' holds {_few(others)}, and no {', '.join(SUFFIXES)} image",
                "convert its images, or empty it",
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _labels_of(folder: Path) -> dict[Path, int | None]:
    """{file: label}; None for all where there is no labels.csv."""
    files, table = _files(folder), folder / LABELS
    if not table.is_file():
        return dict.fromkeys(files)
    lines = [line.partition(",") for line in decode(table).split("\n")[1:] if line.strip()]
    known = {name.strip(): label.strip() for name, _, label in lines}
    for file in files:
        if not known.get(file.name, "").isdigit():
            raise CompressError(
                f"{LABELS} has no class number for {file.name}",
                "write one line for each image: file,label with labels 0, 1, 2, ...",
            )
    if missing := set(known) - {file.name for file in files}:
        raise CompressError(
            f"{LABELS} names {min(missing)}, which is not in '{folder}'", "remove the line"
        )
    return {file: int(known[file.name]) for file in files}


def _media(file: Path) -> Media:
    raw = file.read_bytes()
    try:
        Image.open(io.BytesIO(raw)).close()  # reads the header only
    except OSError as error:
        raise CompressError(f"'{file}' is no image that can be read", "remove the file") from error
    return Media(file, hashlib.sha256(raw).hexdigest())


def _open(document: Document) -> Image.Image:
    media = document.media
    assert media is not None
    if media.index is not None:
        return Image.fromarray(idx_pixels(media.path)[media.index])
    try:
        with Image.open(media.path) as image:
            return image.copy()
    except OSError as error:
        raise CompressError(f"'{media.path}' is damaged ({error})", "remove the file") from error
