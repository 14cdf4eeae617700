"""The recipes run, each on a data set made on the spot; the ImageNet ones on folders of images."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import math
import re
import runpy
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import modprune
from modprune.checkpoints import states
from modprune.data import digits
from modprune.models import resnet20
from modprune.specs import build_model
from tests.processes import in_two

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("data", "weights"), [("cifar10", True), ("cifar100", False)])
def test_cifar(data, weights, tmp_path):
    cifar = recipe("cifar")
    wide = {"cifar10": 10, "cifar100": 100}[data]
    cifar.DATA = {data: lambda root, train: replace(digits(train), num_classes=wide)}
    options = ["--model", "resnet20", "--data", data, "--flops", "0.3", "--epochs", "1", "--out", str(tmp_path)]
    if weights:
        torch.save(resnet20().state_dict(), tmp_path / "w.pt")
        options += ["--weights", str(tmp_path / "w.pt")]
    cifar.main(cifar.parse([*options, "--train-epochs", "1"]))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["flops_removed"]["modprune"] >= 0.3
    pruned = modprune.load(tmp_path / "model.safetensors", resnet20(wide))
    assert modprune.evaluate(pruned, [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]).samples == 2


def test_cifar_trains_anew_for_another_seed(tmp_path, monkeypatch):
    cifar = recipe("cifar")
    cifar.DATA = {"cifar10": lambda root, train: digits(train).subset(torch.arange(256))}
    monkeypatch.setattr(cifar, "prune_job", lambda *_, **__: None)
    options = ["--model", "resnet20", "--train-epochs", "1", "--out", str(tmp_path), "--resume"]
    for seed in "010":
        cifar.main(cifar.parse([*options, "--seed", seed]))
    files = [tmp_path / f"resnet20-cifar10-1-epochs-seed-{seed}.safetensors" for seed in (0, 1)]
    first, second = (modprune.load(file) for file in files)
    assert not torch.equal(first.conv1.weight, second.conv1.weight)


def test_cifar_does_not_train_for_weights_that_are_not_there(tmp_path):
    cifar = recipe("cifar")
    cifar.DATA = {"cifar10": lambda root, train: digits(train)}
    with pytest.raises(FileNotFoundError, match=r"typo\.th: no such file"):
        cifar.main(cifar.parse(["--model", "resnet20", "--weights", "typo.th", "--out", str(tmp_path)]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("--flops 60", "flops=60.0"), ("--width 2", "width=2.0"), ("--criterion magic", "criterion 'magic' is unknown")],
)
def test_cifar_does_not_train_for_options_that_cannot_be_met(wrong, message, tmp_path, monkeypatch):
    cifar = recipe("cifar")
    cifar.DATA = {"cifar10": lambda root, train: digits(train)}
    monkeypatch.setattr(modprune, "finetune", lambda *_, **__: pytest.fail("trained before it looked"))
    with pytest.raises(ValueError, match=message):
        cifar.main(cifar.parse(["--model", "resnet20", *wrong.split(), "--out", str(tmp_path)]))


def image_folder(root: Path) -> None:
    """Two classes, a bright one and a dark one."""
    random = np.random.default_rng(0)
    for part, images in (("train", 12), ("val", 4)):
        for label in range(2):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(0, 255, (80, 70, 3), dtype=np.uint8) // (1 + label)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")


@pytest.mark.parametrize(
    ("spec", "size", "gray"),  # gray: what becomes of a pixel of 0.5, hand-computed from the published mean and spread
    [
        ("torchvision:resnet18", 224, (0.5 - 0.485) / 0.229),
        ("torchvision:efficientnet_b3", 300, (0.5 - 0.485) / 0.229),
        ("timm:vit_tiny_patch16_224", 224, 0.0),
        ("timm:test_resnet", 160, 0.0),
        ("mine.py:network", 224, (0.5 - 0.485) / 0.229),
    ],
)
def test_imagenet_gives_images_as_the_network_was_published_with(spec, size, gray):
    source, _, name = spec.partition(":")
    model = timm.create_model(name) if source == "timm" else None
    given, *transforms = recipe("imagenet").transforms(spec, model)
    assert given == size
    for transform in transforms:
        image = transform(Image.new("RGB", (400, 350), (127, 128, 128)))
        assert image.shape == (3, size, size)
        assert image[0].mean().item() == pytest.approx(gray, abs=0.02)


def small_imagenet(folder: Path) -> tuple[ModuleType, list[str]]:
    """The recipe with a network of two classes and a folder of images, and the options of a run."""
    image_folder(folder / "data")
    (folder / "net.py").write_text("import timm\nnetwork = lambda: timm.create_model('test_resnet', num_classes=2)\n")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), folder / "w.pt")
    AcceleratorState._reset_state(True)  # what a process of its own would take with it
    imagenet = recipe("imagenet")
    imagenet.SIZE, imagenet.RESIZE = 64, 72
    return imagenet, [
        *("--model", f"{folder / 'net.py'}:network", "--weights", str(folder / "w.pt"), "--flops", "0.1"),
        *("--data-dir", str(folder / "data"), "--samples", "12", "--batch-size", "4", "--workers", "0"),
        *("--out", str(folder / "out")),
    ]


@pytest.mark.filterwarnings("ignore")  # of torch's loader, about pinned memory
def test_imagenet(tmp_path, capsys, monkeypatch):
    imagenet, options = small_imagenet(tmp_path)
    options += ["--repeats", "2", "--accumulate", "2"]
    broken = tmp_path / "data" / "train" / "class1" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    imagenet.main(imagenet.parse([*options, "--epochs", "1"]))
    assert "epoch 1: Top-1" in capsys.readouterr().out
    AcceleratorState._reset_state(True)
    rate = imagenet.warmup_cosine

    def told_amid_the_second_epoch(step, *constants):
        if step == 9:  # of 6 an epoch
            signal.raise_signal(signal.SIGTERM)
        return rate(step, *constants)

    monkeypatch.setattr(imagenet, "warmup_cosine", told_amid_the_second_epoch)
    with pytest.raises(SystemExit, match="143"):
        imagenet.main(imagenet.parse([*options, "--epochs", "2", "--resume"]))
    assert [state.name for state in states(tmp_path / "out" / "checkpoints")] == ["epoch-0001-step-0000004"]
    AcceleratorState._reset_state(True)
    weights = torch.load(tmp_path / "w.pt")
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "other.pt")
    for other, message in (
        (["--batch-size", "8"], r"has \{'batch_size': 4, 'steps an epoch': 6\}, this one \{'batch_size': 8, 'steps an"),
        (["--flops", "0.2"], r"has \{'flops': 0\.1\}, this one \{'flops': 0\.2\}: start it as that was"),
        ([], r"has \{'digest of the weights': '\w{16}'\}, this one \{'digest of the weights': "),
    ):
        torch.save(weights if other else torch.load(tmp_path / "other.pt"), tmp_path / "w.pt")
        AcceleratorState._reset_state(True)
        with pytest.raises(ValueError, match=rf"--resume: the run in .* {message}"):
            imagenet.main(imagenet.parse([*options, *other, "--epochs", "2", "--resume"]))
    torch.save(weights, tmp_path / "w.pt")
    capsys.readouterr()
    imagenet.main(imagenet.parse([*options, "--epochs", "3", "--resume"]))
    done = capsys.readouterr()
    with pytest.raises(ValueError, match="holds the state of a run: resume it, or give another folder"):
        imagenet.main(imagenet.parse(options))
    assert f"skipped {broken}" in done.err
    assert "\nunreadable images left out: 1\n" in done.out
    assert "epoch 2:   0%|          | 0/2" in done.err
    assert done.out.count("epoch 2: Top-1") == done.out.count("epoch 3: Top-1") == 1
    assert "epoch 1: Top-1" not in done.out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["flops_removed"]["modprune"] >= 0.1
    modprune.load(tmp_path / "out" / "model.safetensors", timm.create_model("test_resnet", num_classes=2))


def test_imagenet_in_two_processes_without_an_accelerator(tmp_path):
    imagenet, options = small_imagenet(tmp_path)
    text = in_two(imagenet.main, tmp_path, imagenet.parse([*options, "--epochs", "1"]))
    assert text.count("removing") == text.count("epoch 1: Top-1") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2


@pytest.mark.filterwarnings("ignore")  # of torch's loader, about pinned memory
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--batch-size 25", "24 images for --batch-size 25 in 1 processes"),
        ("--model resnet50 --weights published", "--model resnet50: give torchvision:NAME or timm:NAME"),
        ("--flops 2", "flops=2.0: a fraction between 0 and 1 is needed"),
        ("--model timm:test_resnet --weights w.pt", "tells 1000 classes apart and .*data has 2: give a network of"),
    ],
)
def test_imagenet_tells_what_is_wrong_before_it_measures(wrong, message, tmp_path, monkeypatch):
    imagenet, options = small_imagenet(tmp_path)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pt") if "timm" in wrong else None
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        imagenet.main(imagenet.parse([*options, *wrong.split()]))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # of torch's loader, about pinned memory
@pytest.mark.parametrize("part", ["train", "val"])
def test_imagenet_needs_the_same_classes_in_both_folders(part, tmp_path):
    imagenet, options = small_imagenet(tmp_path)
    (tmp_path / "data" / part / "class1").rename(tmp_path / "data" / part / "another")
    with pytest.raises(ValueError, match=r"only one of train/ and val/ has the class 'another': both need the same"):
        imagenet.main(imagenet.parse(options))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # of torch's loader, about pinned memory
def test_imagenet_keeps_the_last_good_state(tmp_path, monkeypatch):
    imagenet, options = small_imagenet(tmp_path)
    rate = imagenet.warmup_cosine
    monkeypatch.setattr(imagenet, "warmup_cosine", lambda step, *rest: rate(step, *rest) if step < 9 else math.inf)
    with pytest.raises(RuntimeError, match="epoch 2: the weights are no longer finite; try a lower --lr"):
        imagenet.main(imagenet.parse([*options, "--epochs", "2"]))
    assert [state.name for state in states(tmp_path / "out" / "checkpoints")] == ["epoch-0001"]


def test_imagenet_replaces_nothing_that_is_of_no_run(tmp_path):
    (tmp_path / "report.json").write_text("mine")
    imagenet = recipe("imagenet")
    with pytest.raises(ValueError, match=r"its report\.json is of no run and would be replaced: give another folder"):
        imagenet.main(imagenet.parse(["--data-dir", str(tmp_path), "--out", str(tmp_path)]))
    assert (tmp_path / "report.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("form", "old", "new", "error"),
    [
        ("png", b"\0\0\0\rIHDR", b"\0\0\0\1IHDR", ValueError),
        ("png", b"IDAT", b"ID\0T", SyntaxError),  # the last of several chunks
        ("bmp", b"\xc8\0\0\0\xc8\0\0\0", b"\xff\xff\0\0\xff\xff\0\0", Image.DecompressionBombError),  # its size
    ],
)
def test_imagenet_leaves_out_what_cannot_be_read(form, old, new, error, tmp_path, capsys):
    image_folder(tmp_path)
    file = tmp_path / "train" / "class0" / f"0.{form}"
    Image.effect_noise((200, 200), 50).convert("RGB").save(file)
    before, after = file.read_bytes().rsplit(old, 1)
    file.write_bytes(before + new + after)
    with pytest.raises(error), file.open("rb") as opened:
        Image.open(opened).convert("RGB")
    images = recipe("imagenet").Images(tmp_path / "train", lambda image: image)
    index = [path for path, _ in images.samples].index(str(file))
    assert images[index] is None
    assert images[index + 1] is not None
    assert capsys.readouterr().err.startswith(f"skipped {file}: ")


@pytest.mark.filterwarnings("ignore")  # of torch's loader, about pinned memory
def test_imagenet_begins_without_the_results_of_a_run_cut_short(tmp_path, monkeypatch):
    imagenet, options = small_imagenet(tmp_path)
    (tmp_path / "out").mkdir()
    modprune.PruningPlan(("layer1.0",)).to_json(tmp_path / "out" / "plan.json")
    (tmp_path / "out" / "run.json").write_text("{}")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(modprune.ModularityPruner, "plan", killed)
    with pytest.raises(KeyboardInterrupt):
        imagenet.main(imagenet.parse(options))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


@pytest.mark.filterwarnings("ignore")  # timm leaves files to the garbage collector
def test_timm(tmp_path, capsys):
    image_folder(tmp_path / "data")
    module, out = recipe("timm_train"), tmp_path / "pruned.safetensors"
    options = [
        *("--model", "resnet18", "--data-dir", str(tmp_path / "data"), "--size", "64", "--epochs", "3"),
        *("--at", "1", "2", "--flops", "0.3", "--samples", "12", "--batch-size", "6", "--workers", "0"),
        *("--out", str(out)),
    ]
    module.main(module.parse(options))
    gc.collect()
    printed = capsys.readouterr().out
    assert printed.startswith("removed")
    assert "epoch 3: loss" in printed
    whole = timm.create_model("resnet18", num_classes=2)
    x = torch.zeros(1, 3, 64, 64)
    assert modprune.count_macs(modprune.load(out, copy.deepcopy(whole)), x) <= 0.7 * modprune.count_macs(whole, x)
    with pytest.raises(ValueError, match="24 images for --batch-size 25: give a smaller one"):
        module.main(module.parse([*options, "--batch-size", "25"]))


@pytest.mark.filterwarnings("ignore")  # timm leaves files to the garbage collector
def test_timm_tests_by_the_classes_of_training(tmp_path, monkeypatch):
    image_folder(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "class0")
    module = recipe("timm_train")
    labels = []
    monkeypatch.setattr(module, "top1", lambda model, loader, device: labels.extend(y for _, y in loader) or 0.0)
    module.main(module.parse([
        *("--model", "test_resnet", "--data-dir", str(tmp_path / "data"), "--size", "32", "--epochs", "1"),
        *("--at", "1", "--flops", "0.1", "--samples", "12", "--batch-size", "6", "--workers", "0"),
        *("--out", str(tmp_path / "pruned.safetensors")),
    ]))  # fmt: skip
    gc.collect()
    assert torch.cat(labels).tolist() == [1] * 4


@pytest.mark.parametrize("name", ["timm_train", "torchvision_train"])
def test_training_tells_what_is_wrong_before_it_begins(name, tmp_path, capsys):
    module = recipe(name)
    image_folder(tmp_path)
    options = ["--data-dir", str(tmp_path), "--batch-size", "4"]
    wrong = {"--epochs": ("0", "--epochs 0: at least 1 is needed"), "--out": (str(tmp_path), "it is a folder")}
    for option, (value, message) in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            module.parse([*options, "--out", str(tmp_path / "pruned.safetensors"), option, value])
        assert message in capsys.readouterr().err


def test_timm_does_not_test_on_what_it_trains_on(tmp_path, capsys):
    image_folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(SystemExit, match="2"):
        recipe("timm_train").parse(["--data-dir", str(tmp_path), "--out", str(tmp_path / "pruned.safetensors")])
    assert f"--data-dir {tmp_path}: it has no folder val" in capsys.readouterr().err


def test_torchvision_needs_the_same_classes_in_both_folders(tmp_path):
    image_folder(tmp_path)
    module = recipe("torchvision_train")
    options = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "pruned.safetensors"), "--weights", "none"]
    with pytest.raises(ValueError, match="24 images for --batch-size 25: give a smaller one"):
        module.main(module.parse([*options, "--batch-size", "25"]))
    shutil.rmtree(tmp_path / "val" / "class0")
    with pytest.raises(ValueError, match="only one of train/ and val/ has the class 'class0': both need the same"):
        module.main(module.parse(options))


def test_torchvision_in_two_processes(tmp_path):
    image_folder(tmp_path / "data")
    out = tmp_path / "pruned.safetensors"
    options = [
        *("--model", "resnet18", "--weights", "none", "--data-dir", tmp_path / "data"),
        *("--size", 64, "--epochs", 2, "--samples", 12, "--batch-size", 4, "--workers", 0, "--out", out),
    ]
    module = recipe("torchvision_train")
    text = in_two(module.main, tmp_path, module.parse(list(map(str, options))))
    assert text.count("epoch 2: loss") == 1
    whole = build_model("torchvision:resnet18")
    whole.fc = torch.nn.Linear(512, 2)
    x = torch.zeros(1, 3, 64, 64)
    assert modprune.count_macs(modprune.load(out, copy.deepcopy(whole)), x) <= 0.7 * modprune.count_macs(whole, x)


def test_your_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(RECIPES / "your_model.py"))
    numbers = re.findall(r"([\d,]+) parameters", capsys.readouterr().out)
    parameters = [int(number.replace(",", "")) for number in numbers]
    assert parameters[1] > parameters[2] == parameters[3]
    assert (tmp_path / "pruned.safetensors").exists()


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--accumulate"])
def test_imagenet_does_nothing_with_no_epochs(option, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        recipe("imagenet").parse(["--data-dir", str(tmp_path), "--out", str(tmp_path), option, "0"])
    assert f"{option} 0: at least 1 is needed" in capsys.readouterr().err
