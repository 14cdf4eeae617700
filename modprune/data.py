"""CIFAR-10, CIFAR-100 and digits held in memory as uint8, augmented a whole batch at a time on the device.

An epoch of CIFAR through PIL and worker processes spends more time on the pictures than a small network does on
learning. Here the whole data set is one uint8 tensor; crops and flips are one gather per batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modprune._inputs import check_range, is_whole
from modprune._processes import place

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageData:
    """A labelled set of images of one size.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, from 0 to `num_classes - 1`.
        num_classes: number of classes.
        mean, std: per channel, of images scaled to [0, 1]; what the networks at hand were trained with.

    Raises:
        ValueError: for other shapes or types, and labels out of range.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        images, labels, channels = self.images, self.labels, len(self.mean)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images: a uint8 tensor (N, C, H, W) is needed, given {_described(images)}")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels: {len(images)} int64, one for each image, are needed, given {_described(labels)}")
        check_range(labels, self.num_classes)
        if not channels == len(self.std) == images.shape[1]:
            raise ValueError(f"images of {images.shape[1]} channels need as many means and deviations, not {channels}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pad(self) -> int:
        """The usual padding of random crops: an eighth of the image, 4 for CIFAR."""
        return self.images.shape[-1] // 8

    def subset(self, index: Tensor) -> ImageData:
        """The images at `index` ((M,) int64), in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def cifar10(root: str | Path, train: bool) -> ImageData:
    """CIFAR-10 from the folder that holds `cifar-10-batches-py`; torchvision verifies its checksums.

    Raises:
        OSError: if the folder is missing, incomplete or altered.
    """
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "CIFAR-10", root, train)


def cifar100(root: str | Path, train: bool) -> ImageData:
    """CIFAR-100 from the folder that holds `cifar-100-python`; torchvision verifies its checksums.

    Raises:
        OSError: if the folder is missing, incomplete or altered.
    """
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "CIFAR-100", root, train)


def _cifar(dataset: Any, name: str, root: str | Path, train: bool) -> ImageData:
    try:
        data = dataset(str(root), train=train, download=False)
    except RuntimeError:
        raise FileNotFoundError(
            f"{root}: no intact {name} there (a file is missing or its checksum is wrong); "
            f"give the folder that holds {dataset.base_folder}, from https://www.cs.toronto.edu/~kriz/cifar.html"
        ) from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageData(images, torch.tensor(data.targets, device="cpu"), len(data.classes), IMAGENET_MEAN, IMAGENET_STD)


def digits(train: bool) -> ImageData:
    """scikit-learn's 1,797 handwritten digits (8x8 grey, ten classes): every fifth is for testing.

    Needs no network and no files. Images are shown to three channels, as the CIFAR networks take them.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    everyfifth = torch.arange(len(images), device="cpu") % 5 == 0
    index = torch.nonzero(~everyfifth if train else everyfifth).flatten()
    labels = torch.from_numpy(bunch.target).long()
    return ImageData(images[index], labels[index], 10, (0.3,) * 3, (0.37,) * 3)


class ImageLoader:
    """Batches `(images, labels, index)` from `ImageData`: float32 (B, C, H, W) normalised, (B,) and (B,) int64.

    The order and the augmentation of an epoch depend on `seed` and `epoch` alone, so a resumed run sees what an
    uninterrupted one sees. Under torch.distributed each process gets its share of a shuffled epoch, and all of the data
    in order, so that each measures the same.

    Args:
        data: the images.
        batch_size: images a batch.
        pad: each image is flipped with probability 1/2 and cropped at random from its frame padded by `pad` zero
            pixels, independently of the others; None for no augmentation.
        shuffle: a new order each epoch; otherwise the order of the data. The last, smaller batch is dropped if so.
        seed: of order and augmentation.
        device: where batches are made and left.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int = 128,
        *,
        pad: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(data, ImageData):
            raise ValueError(f"data of type {type(data).__name__}: ImageData is needed; others go to a DataLoader")
        if not is_whole(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1 is needed, a whole number")
        if pad is not None and (not is_whole(pad) or pad < 0):
            raise ValueError(f"pad={pad}: a whole number of at least 0 is needed, or None for no augmentation")
        if seed < 0:  # some are hashed alike
            raise ValueError(f"seed={seed}: at least 0 is needed")
        self.data, self.batch_size, self.pad, self.shuffle = data, batch_size, pad, shuffle
        self.seed, self.epoch = seed, 0
        self.device = torch.device(device)
        border = pad or 0
        self._padded = torch.nn.functional.pad(data.images, (border,) * 4).to(self.device)
        self._labels = data.labels.to(self.device)
        scale = 255 * torch.tensor(data.std, device=self.device)
        self._shift = (-255 * torch.tensor(data.mean, device=self.device) / scale).view(1, -1, 1, 1)
        self._scale = scale.reciprocal().view(1, -1, 1, 1)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration draws; without a call, iterations count up from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        share = len(self._share(torch.arange(len(self.data), device="cpu")))
        return share // self.batch_size if self.shuffle else -(-share // self.batch_size)

    @property
    def samples(self) -> int:
        """How many images an epoch gives, over all processes."""
        return len(self) * self.batch_size * place()[1] if self.shuffle else len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.arange(len(self.data), device="cpu")
        if self.shuffle:
            order = torch.randperm(len(self.data), generator=_generator(self.seed, self.epoch, 0), device="cpu")
        crops = self._crops() if self.pad is not None else None
        for number, index in enumerate(self._share(order).to(self.device).split(self.batch_size)[: len(self)], 1):
            images = self._padded[index] if crops is None else _crop(self._padded, index, crops[index], self.data)
            if number == len(self):
                self.epoch += 1  # with the last batch: a caller that counts batches never asks for StopIteration
            yield images * self._scale + self._shift, self._labels[index], index

    def _crops(self) -> Tensor:
        """(N, 3) int64 of this epoch: row and column of the crop, and whether it is flipped."""
        generator = _generator(self.seed, self.epoch, 1)
        offsets = torch.randint(2 * (self.pad or 0) + 1, (len(self.data), 2), generator=generator, device="cpu")
        flips = torch.randint(2, (len(self.data), 1), generator=generator, device="cpu")
        return torch.cat([offsets, flips], 1).to(self.device)

    def _share(self, order: Tensor) -> Tensor:
        rank, processes = place() if self.shuffle else (0, 1)
        return order[: len(order) // processes * processes][rank::processes]  # as many for each


def calibration(data: ImageData, seed: int = 0, device: torch.device | str = "cpu") -> ImageLoader:
    """Batches to measure on: shuffled, of 100 images at most, and so many that hardly an image is left over."""
    share = len(data) // place()[1]
    size = share // max(1, -(-share // 100))
    return ImageLoader(data, max(1, size), shuffle=True, seed=seed, device=device)


def _crop(padded: Tensor, index: Tensor, crops: Tensor, data: ImageData) -> Tensor:
    """One crop of `data`'s size per image of `padded[index]`: a single gather, each image at its own offset."""
    height, width = data.images.shape[-2:]
    across = torch.arange(width, device=padded.device)
    rows = crops[:, 0, None] + torch.arange(height, device=padded.device)
    columns = crops[:, 1, None] + torch.where(crops[:, 2, None] == 1, across.flip(0), across)
    batch, channel = index[:, None, None, None], torch.arange(padded.shape[1], device=padded.device)
    return padded[batch, channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    """A generator of its own for each (seed, epoch, stream): mixed by a hash, so that neighbours are unrelated."""
    return torch.Generator().manual_seed(hash((seed, epoch, stream)) & 0x7FFF_FFFF_FFFF_FFFF)


def set_epoch(loader: object, epoch: int) -> None:
    """Tell a loader, or the samplers of a torch DataLoader, which epoch comes next, those that want to know."""
    batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
    inner = getattr(batches, "sampler", None)  # of a plain DataLoader its `sampler`
    for target in (loader, batches, inner):
        if hasattr(target, "set_epoch"):
            target.set_epoch(epoch)
