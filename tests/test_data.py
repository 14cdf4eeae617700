"""Batches on the device equal torchvision's transforms, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from sklearn.datasets import load_digits
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torchvision.datasets import CIFAR10

from modprune.data import ImageData, ImageLoader, calibration, cifar10, cifar100, digits, set_epoch


def images(count: int = 20, size: int = 8) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.arange(count) % 4, 4, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def test_crops_and_flips_equal_torchvision():
    data = images()
    loader = ImageLoader(data, 20, pad=2)
    crops = loader._crops()
    ((x, y, index),) = loader
    assert torch.equal(y, data.labels)
    for i in range(20):
        row, column, flip = crops[i].tolist()
        image = TF.crop(TF.pad(data.images[i], 2), row, column, 8, 8)
        image = TF.hflip(image) if flip else image
        expected = TF.normalize(image / 255, data.mean, data.std)
        assert torch.allclose(x[index == i][0], expected, atol=1e-6)
    assert len({tuple(crop) for crop in crops.tolist()}) > 5


def test_an_epoch_depends_on_seed_and_number_alone():
    def epoch(seed: int, number: int, **options):
        loader = ImageLoader(images(), 8, pad=2, shuffle=True, seed=seed, **options)
        loader.set_epoch(number)
        return torch.cat([x for x, _, _ in loader])

    assert torch.equal(epoch(0, 3), epoch(0, 3))
    assert not torch.equal(epoch(0, 3), epoch(0, 4))
    assert not torch.equal(epoch(0, 3), epoch(1, 3))


@pytest.mark.parametrize("by", ["sampler", "batch_sampler"])
def test_a_dataloaders_samplers_are_told_the_epoch(by):
    sampler = DistributedSampler(range(20), 1, 0)
    loader = DataLoader(range(20), **{by: sampler if by == "sampler" else BatchSampler(sampler, 4, drop_last=False)})
    orders = []
    for number in (0, 1, 0):
        set_epoch(loader, number)
        orders.append(torch.cat(list(loader)).tolist())
    assert orders[0] == orders[2] != orders[1]


def test_every_epoch_crops_anew():
    loader = ImageLoader(images(), 20, pad=2)
    assert not torch.equal(*(x for _ in range(2) for x, _, _ in loader))


def test_training_drops_the_last_batch_and_testing_keeps_it():
    assert [len(y) for _, y, _ in ImageLoader(images(), 8, shuffle=True)] == [8, 8]
    assert [len(y) for _, y, _ in ImageLoader(images(), 8)] == [8, 8, 4]
    assert [len(ImageLoader(images(), 8, shuffle=shuffle)) for shuffle in (True, False)] == [2, 3]


def test_cifar10_is_torchvisions(cifar10_dir):
    for train, count in ((True, 50_000), (False, 10_000)):
        data, reference = cifar10(cifar10_dir, train), CIFAR10(str(cifar10_dir), train)
        assert data.images.shape == (count, 3, 32, 32)
        assert data.labels.tolist() == reference.targets
        assert torch.equal(data.images, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
        assert torch.equal(data.images[7], TF.pil_to_tensor(reference[7][0]))


def test_cifar100_has_its_own_classes_and_folder(tmp_path, monkeypatch):
    class Stub:
        base_folder = "cifar-100-python"

        def __init__(self, root: str, train: bool, download: bool) -> None:
            if not train:
                raise RuntimeError("Dataset not found or corrupted.")
            self.data, self.targets = np.zeros((3, 32, 32, 3), np.uint8), [0, 50, 99]
            self.classes = [str(i) for i in range(100)]

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Stub)
    data = cifar100(tmp_path, train=True)
    assert (data.num_classes, data.labels.tolist(), tuple(data.images.shape)) == (100, [0, 50, 99], (3, 3, 32, 32))
    with pytest.raises(FileNotFoundError, match=r"no intact CIFAR-100 there.*cifar-100-python"):
        cifar100(tmp_path, train=False)


def test_a_missing_or_altered_folder_is_one_line(tmp_path, cifar10_dir):
    with pytest.raises(FileNotFoundError, match="no intact CIFAR-10 there"):
        cifar10(tmp_path, train=True)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for file in (cifar10_dir / "cifar-10-batches-py").iterdir():
        (tmp_path / "cifar-10-batches-py" / file.name).write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="checksum is wrong"):
        cifar10(tmp_path, train=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(4, 3, 8, 8)}, "images: a uint8 tensor .* given torch.float32"),
        ({"images": np.zeros((4, 3, 8, 8), np.uint8)}, "images: .* given ndarray"),
        ({"labels": [0, 1, 2, 3]}, "labels: 4 int64, .* given list"),
        ({"labels": torch.arange(5)}, r"labels: 4 int64, .* given torch.int64 of shape \(5,\)"),
        ({"labels": torch.arange(4) - 1}, r"labels from -1 to 2 with 4 classes"),
        ({"mean": (0.5,), "std": (0.5,)}, "images of 3 channels need as many means and deviations, not 1"),
    ],
)
def test_what_is_no_data_set_is_named(change, message):
    given = {"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "labels": torch.arange(4), "num_classes": 4}
    with pytest.raises(ValueError, match=message):
        ImageData(**{**given, "mean": (0.5,) * 3, "std": (0.5,) * 3, **change})


def test_digits_are_split_once():
    train, test, everything = digits(True), digits(False), load_digits()
    for data, mine in ((test, np.arange(1797) % 5 == 0), (train, np.arange(1797) % 5 != 0)):
        assert data.labels.tolist() == everything.target[mine].tolist()
        assert np.allclose(data.images[:, 2].numpy(), everything.images[mine] * 255 / 16, atol=0.5)
    assert train.images.shape[1:] == (3, 8, 8)
    scaled = train.images[:, 0].float() / 255
    assert scaled.mean().item() == pytest.approx(train.mean[0], abs=0.01)
    assert scaled.std().item() == pytest.approx(train.std[0], abs=0.01)


def test_seeds_below_zero_are_refused():
    with pytest.raises(ValueError, match="seed=-1: at least 0 is needed"):  # -1 and -2 would give the same order
        ImageLoader(images(), seed=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad": -1}, "pad=-1: a whole number of at least 0"),
        ({"batch_size": 2.5}, "batch_size=2.5: at least 1 is needed, a whole number"),
        ({"data": [1, 2]}, "data of type list: ImageData is needed"),
    ],
)
def test_a_loader_says_what_it_cannot_work_with(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageLoader(**({"data": digits(True)} | arguments))


def test_calibration_of_few_images_has_a_batch_for_each_process(monkeypatch):
    for processes in (1, 2, 3):
        monkeypatch.setattr("modprune.data.place", lambda processes=processes: (0, processes))
        loader = calibration(digits(True).subset(torch.arange(150)))
        assert 100 <= loader.samples <= 150
        assert len(list(loader)) == len(loader) > 0


def test_an_epoch_ends_with_its_last_batch_for_those_who_count_them():
    loader = ImageLoader(images(), 8, pad=2, shuffle=True)
    first = next(iter(loader))[2]  # a look costs no epoch
    epochs = []
    for _ in range(3):
        batches = iter(loader)
        epochs.append(torch.cat([next(batches)[2] for _ in range(len(loader))]).tolist())
    assert epochs[0][:8] == first.tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("count", [1, 99, 100, 101, 150, 199, 450, 1437])
def test_hardly_an_image_is_left_over_in_calibration(count):
    loader = calibration(digits(train=True).subset(torch.arange(count)))
    assert 0 <= count - loader.samples < -(-count // 100)
    assert loader.batch_size <= 100
    assert sum(len(labels) for _, labels, _ in loader) == loader.samples
