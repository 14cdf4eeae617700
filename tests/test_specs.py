"""A spec gives a network, or one line that says what is wrong with it."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from modprune.data import digits
from modprune.models import CifarResNet
from modprune.specs import build_model, data_shape, load_data


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("resnet56", "CifarResNet"),
        ("torchvision:resnet18", "ResNet"),
        ("torchvision:googlenet", "GoogLeNet"),
        ("torchvision:fcn_resnet50", "FCN"),
        ("timm:resnet18", "ResNet"),
        ("transformers:resnet", "ResNetForImageClassification"),
    ],
)
def test_every_library(spec, name):
    assert type(build_model(spec)).__name__ == name


def test_a_function_in_a_file(tmp_path):
    (tmp_path / "a:b.py").write_text("from modprune.models import resnet20\ndef make(): return resnet20(num_classes=3)")
    model = build_model(f"{tmp_path}/a:b.py:make")
    assert isinstance(model, CifarResNet)
    assert isinstance(model.linear, nn.Linear)
    assert model.linear.out_features == 3


def test_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "a_neighbour_of_net.py").write_text("CLASSES = 3\n")
    text = "from a_neighbour_of_net import CLASSES\nfrom modprune.models import resnet20\n"
    (tmp_path / "net.py").write_text(text + "def make(): return resnet20(CLASSES)")
    found = list(sys.path)
    assert build_model(f"{tmp_path}/net.py:make").linear.out_features == 3
    assert sys.path == found


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnet57", ValueError, "model 'resnet57' is unknown: give one of resnet20"),
        ("torchvision:nope", ValueError, "torchvision has no such model"),
        ("timm:nope", ValueError, "timm has no such model"),
        ("transformers:nope", ValueError, "transformers has no such model type"),
        ("keras:vgg", ValueError, "or torchvision:NAME, timm:NAME"),
        ("timm:", ValueError, "or torchvision:NAME, timm:NAME"),
        ("gone.py:make", ValueError, r"gone\.py: no such file"),
        ("{here}/m.py:gone", ValueError, r"m\.py has no function 'gone'"),
        ("{here}/m.py:number", ValueError, r"gives int, not Module"),
        ("{here}/m.py:broken", RuntimeError, "cannot be built: ZeroDivisionError: division by zero"),
        ("{here}/bad.py:f", ValueError, "No module named 'no_such_library'"),
    ],
)
def test_what_names_nothing_is_one_line(tmp_path, spec, error, message):
    (tmp_path / "m.py").write_text("number = lambda: 1\nbroken = lambda: 1 / 0\n")
    (tmp_path / "bad.py").write_text("import no_such_library\n")
    with pytest.raises(error, match=message) as caught:
        build_model(spec.format(here=tmp_path))
    assert "\n" not in str(caught.value)


DATA_FILE = """
from dataclasses import replace
from modprune.data import digits

def three(train):
    data = digits(train)
    return replace(data.subset(data.labels < 3), num_classes=3)

def text(train): return "images"
def broken(train): return {}["images"]
def ending(train): raise SystemExit(0)
"""


def test_a_data_set_from_a_file(tmp_path):
    (tmp_path / "d.py").write_text(DATA_FILE)
    for train in (True, False):
        data = load_data(f"{tmp_path}/d.py:three", "", train)
        assert len(data) == int((digits(train).labels < 3).sum())
    assert data_shape(f"{tmp_path}/d.py:three") == (3, (3, 8, 8))
    assert build_model("resnet20", num_classes=3).linear.out_features == 3


def test_shapes_that_need_no_files_are_those_of_the_data(cifar10_dir):
    data = load_data("cifar10", cifar10_dir, train=False)
    assert data_shape("cifar10") == (data.num_classes, data.images.shape[1:])
    assert data_shape("cifar100") == (100, (3, 32, 32))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("cifar11", ValueError, "data 'cifar11' is unknown: give one of cifar10, cifar100, digits, or path/to/file.py"),
        ("{here}/d.py:gone", ValueError, r"d\.py has no function 'gone'"),
        ("{here}/d.py:text", ValueError, r"gives str, not ImageData"),
        ("{here}/d.py:ending", RuntimeError, "cannot be built: it calls sys.exit"),
        ("{here}/d.py:broken", RuntimeError, "cannot be built: KeyError: 'images'"),
    ],
)
def test_data_that_is_none_is_one_line(tmp_path, spec, error, message):
    (tmp_path / "d.py").write_text(DATA_FILE)
    with pytest.raises(error, match=message) as caught:
        load_data(spec.format(here=tmp_path), "", train=True)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="timm is not installed: pip install timm"):
        build_model("timm:resnet18")
