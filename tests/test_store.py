"""Saved models come back bit for bit; anything else is one line and leaves the model alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from timm.utils import ModelEmaV3

from modprune.blocks import find_blocks
from modprune.models import MODELS, CifarResNet, CifarVGG, resnet18, resnet20, resnet56, vgg11_bn
from modprune.plan import PruningPlan
from modprune.pruner import ModularityPruner
from modprune.store import checksum, load, save
from modprune.surgery import removed_blocks
from modprune.weights import load_weights

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
REMOVE = ("layer1.1", "layer2.0", "layer3.2")


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = PruningPlan(REMOVE).apply(resnet20(num_classes=7)).eval()
    save(model, tmp_path / "a.safetensors")
    return model, tmp_path / "a.safetensors"


def test_round_trip_with_and_without_a_model(saved):
    model, path = saved
    for loaded in (load(path), load(path, resnet20(num_classes=7))):
        assert torch.equal(loaded.eval()(X), model(X))
        assert removed_blocks(loaded).remove == REMOVE


@pytest.mark.parametrize("name", MODELS)
def test_every_built_in_network_comes_back_by_itself(name, tmp_path):
    model = MODELS[name](num_classes=7).eval()
    last = [block.name for block in find_blocks(model, X)][-1]
    PruningPlan((last,)).apply(model)
    save(model, tmp_path / "a.safetensors")
    drawn = torch.get_rng_state()
    loaded = load(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert type(loaded) is type(model)
    assert loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.eval()(X), model(X))


def test_a_head_of_ones_own_comes_back_or_asks_for_the_network(tmp_path):
    model = resnet18(width=0.125).eval()
    model.linear = torch.nn.Linear(64, 3)
    save(model, tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors").eval()(X), model(X))


def test_a_built_in_network_made_of_numpys_numbers_comes_back(tmp_path):
    made = (
        CifarResNet(np.array([2, 1, 2]), num_classes=np.int64(4), in_channels=np.int64(3)),
        resnet18(num_classes=np.int64(4), width=np.float32(0.125)),
        CifarVGG(np.int64(11), num_classes=np.int64(4), width=np.float32(0.125)),
    )
    for model in made:
        save(model, tmp_path / "a.safetensors")
        loaded = load(tmp_path / "a.safetensors")
        assert loaded.arguments == model.arguments
        assert torch.equal(loaded.eval()(X), model.eval()(X))


def gelu(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.ReLU):
            model.set_submodule(name, torch.nn.GELU())


class ReLU(torch.nn.ReLU):
    """Something else under the same name."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (resnet18, lambda model: setattr(model, "linear", torch.nn.Sequential(torch.nn.Linear(64, 3)))),
        (resnet18, lambda model: setattr(model, "conv1", torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False))),
        (resnet18, lambda model: setattr(model, "layer4", torch.nn.Conv2d(32, 64, 1))),
        (vgg11_bn, lambda model: setattr(model, "classifier", torch.nn.Linear(64, 3))),
        (vgg11_bn, gelu),
        (vgg11_bn, lambda model: setattr(model.features, "2", ReLU())),
    ],
)
def test_a_built_in_network_that_was_changed_asks_for_itself(make, change, tmp_path):
    model, whole = make(width=0.125).eval(), make(width=0.125).eval()
    torch.manual_seed(1)
    change(model)
    change(whole)
    save(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="give the unpruned model to load into"):
        load(tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors", whole)(X), model(X))


@pytest.mark.parametrize(("make", "ignored"), [(vgg11_bn, ["features.0"]), (resnet18, ["layer1.0.conv1"])])
def test_a_built_in_network_of_fewer_channels_comes_back_by_itself(make, ignored, tmp_path):
    model = make(width=0.25).eval()
    ModularityPruner(model, X, (), "l1_norm", blocks=1, width=0.3, ignored_layers=ignored).step()
    save(model, tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors").eval()(X), model(X))


def test_numbers_of_another_kind_are_of_another_network(saved):
    _, path = saved
    tensors = safetensors.torch.load(path.read_bytes())
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["modprune"])
    tensors["linear.bias"] = tensors["linear.bias"].long()
    header["sha256"] = checksum({key: header[key] for key in ("plan", "narrowed", "built_in", "unsaved")}, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {"modprune": json.dumps(header)}))
    with pytest.raises(ValueError, match=r"linear\.bias is of torch\.int64 there and of torch\.float32 here"):
        load(path)


def test_a_network_without_values_is_not_filled(saved):
    _, path = saved
    with torch.device("meta"):
        model = resnet20(num_classes=7)
    for use in (lambda: load(path, model), lambda: find_blocks(model, X)):
        with pytest.raises(ValueError, match=r"no weights yet \(it is on the meta device\): load them first"):
            use()
    assert not removed_blocks(model).remove


def test_a_network_without_shapes_or_blocks_is_not_filled(saved):
    model, path = saved
    with pytest.raises(ValueError, match=r"has lost \S+ before: give a whole one"):
        load(path, model)
    with pytest.raises(ValueError, match=r"^0.weight: has no shape yet"):
        load(path, torch.nn.Sequential(torch.nn.LazyLinear(2)))


def test_a_file_of_the_first_format(saved):
    model, path = saved
    tensors = safetensors.torch.load(path.read_bytes())
    structure = {
        "plan": json.loads(removed_blocks(model).to_json()),
        "narrowed": [],
        "cifar_resnet": {"blocks": [3, 3, 3], "num_classes": 7, "in_channels": 3},
    }
    header = {"format": 1, **structure, "sha256": checksum(structure, tensors)}
    path.write_bytes(safetensors.torch.save(tensors, {"modprune": json.dumps(header)}))
    assert torch.equal(load(path).eval()(X), model(X))


def test_a_network_derived_from_a_built_in_one_is_not_taken_for_it(tmp_path):
    class Doubled(CifarResNet):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Doubled((3, 3, 3)).eval()
    save(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="give the unpruned model to load into"):
        load(tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors", Doubled((3, 3, 3))).eval()(X), model(X))


def test_round_trip_of_a_network_from_elsewhere(tmp_path):
    model = PruningPlan(("layer1.0", "layer2.0")).apply(torchvision.models.resnet18()).eval()
    model = model.to(memory_format=torch.channels_last)
    save(model, tmp_path / "b.safetensors")
    x = torch.randn(1, 3, 64, 64)
    loaded = load(tmp_path / "b.safetensors", torchvision.models.resnet18()).eval()
    assert torch.equal(loaded.to(memory_format=torch.channels_last)(x), model(x))
    with pytest.raises(ValueError, match="give the unpruned model"):
        load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "wrap", [torch.compile, torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel, ModelEmaV3]
)
def test_wrappers_are_not_saved_or_filled(tmp_path, wrap):
    model = PruningPlan(REMOVE).apply(resnet20()).eval()
    save(wrap(model), tmp_path / "w.safetensors")
    assert torch.equal(load(tmp_path / "w.safetensors").eval()(X), model(X))
    with pytest.raises(ValueError, match=r"the model is wrapped in .*: give what it wraps"):
        load(tmp_path / "w.safetensors", wrap(resnet20()))


def test_a_built_in_network_keeps_its_precision(tmp_path):
    model = resnet20().to(torch.bfloat16).eval()
    save(model, tmp_path / "half.safetensors")
    loaded = load(tmp_path / "half.safetensors").eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.bn1.num_batches_tracked.dtype == torch.int64
    assert torch.equal(loaded(X.bfloat16()), model(X.bfloat16()))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "1"},
        {"format": 0},
        {"plan": []},
        {"built_in": {"class": "CifarResNet", "arguments": {"blocks": [3, 3], "num_classes": 7}}},
        {"built_in": {"class": "CifarResNet", "arguments": {"blocks": [900, 900, 900], "num_classes": 7}}},
        {"built_in": {"class": "CifarResNet", "arguments": {"blocks": [10**9, -(10**9), 3]}}},
        {"built_in": {"class": "CifarVGG", "arguments": {"depth": 12}}},
        {"built_in": {"class": "Module", "arguments": {}}},
        {"built_in": 3},
        {"built_in": 0},
        {"built_in": {}},
        {"narrowed": [1]},
    ],
)
def test_a_damaged_header(saved, change):
    _, path = saved
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["modprune"]) | change
    tensors = safetensors.torch.load(path.read_bytes())
    structure = {key: value for key, value in header.items() if key not in ("format", "sha256")}
    header["sha256"] = checksum(structure, tensors)  # whoever forges a header can forge this too
    path.write_bytes(safetensors.torch.save(tensors, {"modprune": json.dumps(header)}))
    with pytest.raises(ValueError, match=rf"{path.name}: its header is damaged"):
        load(path)


def damage(path, kind: str):
    data = path.read_bytes()
    if kind == "other plan":
        path.write_bytes(data.replace(b"layer1.1", b"layer1.2", 1))
    if kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "altered":
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "plain":
        safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    elif kind == "newer":
        tensors = safetensors.torch.load(data)
        path.write_bytes(safetensors.torch.save(tensors, metadata={"modprune": json.dumps({"format": 9})}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "not a whole safetensors file"),
        ("altered", "the file was altered"),
        ("other plan", "the file was altered"),
        ("text", "not a whole safetensors file"),
        ("plain", "not a file of modprune.save"),
        ("newer", "format 9; this modprune reads up to 3"),
    ],
)
def test_damaged_files(saved, kind, message):
    _, path = saved
    damage(path, kind)
    model = resnet20(num_classes=7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load(path, model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("make", "message"), [(resnet56, "another network"), (resnet20, "number of classes")])
def test_another_network_stays_as_it_was(saved, make, message):
    _, path = saved
    model = make()
    before = model.eval()(X)
    with pytest.raises(ValueError, match=message):
        load(path, model)
    assert torch.equal(model(X), before)
    assert not removed_blocks(model).remove


class Tabled(torch.nn.Module):
    """Computes with a table that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.register_buffer("table", torch.rand(4, generator=torch.Generator().manual_seed(0)), persistent=False)
        self.register_buffer("fine", torch.ones(4), persistent=False)

    def forward(self, x):
        return x + self.layer(x * self.table) * self.fine.to(x.dtype)


def test_buffers_that_are_not_saved_come_back_in_their_precision(tmp_path):
    model = torch.nn.Sequential(Tabled(), Tabled()).bfloat16()
    model[0].fine = model[0].fine.float()
    save(model, tmp_path / "half.safetensors")
    again = load(tmp_path / "half.safetensors", torch.nn.Sequential(Tabled(), Tabled()))
    assert [b.dtype for b in again.buffers()] == [b.dtype for b in model.buffers()]
    x = torch.randn(3, 4).bfloat16()
    assert torch.equal(again(x), model(x))


def test_a_folder_of_weights_is_told(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"a folder; give the \.safetensors file in it"):
        load(tmp_path)


def test_weights_of_a_pruned_network_fit_the_same_one_alone(saved):
    model, path = saved
    assert torch.equal(load_weights(load(path), path).eval()(X), model(X))
    with pytest.raises(ValueError, match=r"another network .*; a pruned network in a file of modprune\.save is what"):
        load_weights(resnet20(num_classes=7), path)


def test_extra_state_that_is_no_tensor_is_named(tmp_path):
    class Counting(torch.nn.Identity):
        def get_extra_state(self):
            return {"steps": 3}

    model = resnet20()
    model.counting = Counting()
    with pytest.raises(
        ValueError, match=r"counting\._extra_state: a dict in the state dict, and the file holds tensors"
    ):
        save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize(
    ("odd", "kind"),
    [
        (lambda t: t.to_sparse(), "torch.sparse_coo of torch.float32"),
        (lambda t: t.to(torch.complex128), "torch.strided of torch.complex128"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "torch.strided of torch.qint8"),
    ],
)
def test_what_safetensors_cannot_hold_is_named(odd, kind, tmp_path):
    model = resnet20()
    model.register_buffer("odd", odd(torch.ones(3)))
    with pytest.raises(ValueError, match=f"odd: {kind}, which safetensors cannot hold"):
        save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written .*give a folder that can"):
        save(resnet20(), tmp_path / "file" / "a.safetensors")
