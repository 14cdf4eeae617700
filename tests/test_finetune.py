"""Fine-tuning: its loss and schedule by hand, resume, teachers, and stopping on NaN."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import random
import signal
from dataclasses import asdict
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, TensorDataset
from torchvision.transforms import Compose

from modprune.checkpoints import states
from modprune.data import ImageLoader, digits
from modprune.distill import CachedTeacher, distillation_loss
from modprune.evaluate import evaluate
from modprune.finetune import finetune
from modprune.models import CifarResNet
from modprune.recipe import Recipe, warmup_cosine
from tests.processes import in_two

module = importlib.import_module("modprune.finetune")  # the package shows the function under that name
DATA = digits(True).subset(torch.arange(256))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return CifarResNet((1, 1, 1))


def loader(batch_size: int = 64) -> ImageLoader:
    return ImageLoader(DATA, batch_size, pad=1, shuffle=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns_and_returns_what_it_measured():
    model = network().eval()
    history = finetune(model, loader(), loader(), epochs=16, lr=0.05, progress=False)
    assert history[-1].loss < 0.6 * history[0].loss
    assert history[-1].top1 is not None
    assert history[-1].top1 > 60
    assert history[-1].lr == pytest.approx(0)
    assert not model.training
    assert "forward" not in model.__dict__


def test_an_epoch_equals_a_plain_loop(monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", in_float32)
    model, teacher, batches = network(), network(1).eval(), [(images, labels) for images, labels, _ in loader()]
    twin = copy.deepcopy(model).train()
    constants = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.01}
    rest = {"distill": 0.7, "temperature": 2.0, "warmup": 0.0}
    finetune(model, batches, teacher=teacher, epochs=1, progress=False, **constants, **rest)
    optimizer = torch.optim.SGD(twin.parameters(), **constants, nesterov=True)
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.05 * warmup_cosine(step, 0, len(batches))
        optimizer.zero_grad()
        distillation_loss(twin(images), labels, teacher(images).detach(), 0.7, 2.0).backward()
        optimizer.step()
    assert same(model, twin)


def test_the_bar_and_the_epochs_tell_the_accuracy_on_the_batches_as_they_came(capsys, monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", in_float32)  # of the plain loop that it is held against
    model = network()
    batches = [(images, labels) for images, labels, _ in ImageLoader(DATA.subset(torch.arange(234)), 8)]  # 29 and 2
    twin = copy.deepcopy(model).train()
    logits = [twin(images) for images, _ in batches]
    right = [int((some.argmax(1) == labels).sum()) for some, (_, labels) in zip(logits, batches, strict=True)]
    (epoch,) = finetune(model, batches, epochs=1, lr=0.0)
    assert epoch.train_top1 == pytest.approx(100 * sum(right) / 234)
    loss = nn.functional.cross_entropy(torch.cat(logits), torch.cat([labels for _, labels in batches]))
    assert epoch.loss == pytest.approx(loss.item())
    shown = capsys.readouterr().err
    assert f"top1={100 * sum(right[:25]) / 200:.1f}, lr=0.0000, images=" in shown
    (epoch,) = finetune(model, [{"x": images} for images, _ in batches], teacher=twin, epochs=1, distill=1.0)
    assert epoch.train_top1 is None
    assert "top1=" not in capsys.readouterr().err


def test_what_is_measured_between_the_epochs_is_in_full_precision(monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", lambda device: torch.bfloat16)
    model, images, steps, seen = network(), DATA.images[:8].float(), [], []
    model.linear.register_forward_hook(lambda m, _, out: steps.append(out.dtype) if m.training else None)
    look = torch.no_grad()(lambda _: seen.append(model.eval()(images)))
    (epoch,) = finetune(model, loader(), loader(), epochs=1, lr=0.05, progress=False, after_epoch=look)
    look(None)
    assert torch.equal(*seen)
    assert set(steps) == {torch.bfloat16}
    assert epoch.top1 == evaluate(model, loader()).top1


def test_a_model_wrapped_by_torch_compile_is_trained_and_left_as_found(monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", lambda device: torch.bfloat16)
    model = network()
    wrapped = torch.compile(model, backend="eager")
    before = dict(vars(wrapped)), dict(vars(model))
    (epoch,) = finetune(wrapped, loader(), loader(), epochs=1, lr=0.05, progress=False)
    assert (vars(wrapped), vars(model)) == before
    assert epoch.top1 == evaluate(model, loader()).top1


def test_ones_own_accelerator_prepares_the_model_afterwards():
    model = network()
    finetune(model, loader(), epochs=1, lr=0.05, progress=False)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    assert "_original_forward" in vars(prepared)


def test_ones_own_accelerator_is_on_its_own_device_afterwards(monkeypatch):
    PartialState._reset_state()  # as in a new process
    finetune(network(), loader(), epochs=1, lr=0.05, progress=False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    assert Accelerator().device.type == "meta"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_rate_rises_then_falls_to_zero():
    rates = [warmup_cosine(step, 10, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, stop):
    def run(**options):
        student, teacher, data = network(), network(1), loader()
        cached = CachedTeacher(teacher, len(DATA), looks=2)
        return student, finetune(student, data, teacher=cached, epochs=4, progress=False, **options)

    whole, history = run()
    save = module.save_state

    def die(accelerator, folder, epoch, step):
        save(accelerator, folder, epoch)
        if epoch == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", die)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints=tmp_path)
    monkeypatch.setattr(module, "save_state", save)
    with pytest.raises(ValueError, match="holds the state of a run"):
        run(checkpoints=tmp_path)
    resumed, again = run(checkpoints=tmp_path, resume=True)
    assert same(whole, resumed)
    assert [e.loss for e in again] == [e.loss for e in history]
    for size, recipe, message in (
        (64, {"epochs": 4, "lr": 0.5}, r"of a run with \{'lr': 0.1\}, this one has \{'lr': 0.5\}: start in"),
        (32, {"epochs": 4}, r"of a run with \{'steps': 4\}, this one has \{'steps': 8\}"),
        (64, {"epochs": 3}, "has done or begun 4 already"),
    ):
        other, options = network(2), {"checkpoints": tmp_path, "resume": True, "progress": False}
        with pytest.raises(ValueError, match=message):
            finetune(other, loader(size), teacher=CachedTeacher(network(1), len(DATA)), **options, **recipe)
        assert same(other, network(2))


class Noisy(Dataset):
    """Images that a generator of the data set's own has a part in."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.names = random.SystemRandom()  # has no state

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int):
        return DATA.images[index] / 255 + self.rng.random(dtype=np.float32), DATA.labels[index]


class Jitter:
    """A transform with a generator of its own, as albumentations' are."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, image):
        return image / 255 + self.rng.random(dtype=np.float32)


class Transformed(Dataset):
    """Images as they come out of a list of transforms, one of which draws."""

    def __init__(self) -> None:
        self.transform = Compose([torch.Tensor.float, Jitter()])

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int):
        return self.transform(DATA.images[index]), DATA.labels[index]


class Sampled(Sampler):
    """Its generator is one of the class."""

    generator = torch.Generator()

    def __init__(self) -> None:
        self.generator.manual_seed(0)

    def __iter__(self):
        return iter(torch.randperm(len(DATA), generator=self.generator).tolist())

    def __len__(self) -> int:
        return len(DATA)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Noisy(), 64),
        lambda: DataLoader(ConcatDataset([Transformed()]), 64),
        lambda: DataLoader(TensorDataset(DATA.images / 255, DATA.labels), 64, sampler=Sampled()),
    ],
    ids=["data", "transforms", "sampler"],
)
def test_generators_of_ones_own_go_on_in_a_resumed_run(loader, tmp_path):
    def stop(epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    whole, resumed, run = network(), network(), {"epochs": 2, "progress": False}
    finetune(whole, loader(), **run)
    with pytest.raises(KeyboardInterrupt):
        finetune(network(), loader(), checkpoints=tmp_path, after_epoch=stop, **run)
    finetune(resumed, loader(), checkpoints=tmp_path, resume=True, **run)
    assert same(whole, resumed)


class Late(Noisy):
    """Its generator is made when it is first read."""

    def __init__(self) -> None:
        self.made = None

    @property
    def rng(self) -> np.random.Generator:
        self.made = np.random.default_rng(0) if self.made is None else self.made
        return self.made


def test_a_generator_that_is_made_late_is_told_of_and_no_obstacle(tmp_path):
    run = {"epochs": 1, "checkpoints": tmp_path, "progress": False}
    finetune(network(), DataLoader(Late(), 64), **run)
    with pytest.warns(UserWarning, match=r"no generator Late.made \(part 3\) yet: its random numbers begin anew"):
        finetune(network(), DataLoader(Late(), 64), resume=True, **run)


def test_a_damaged_state_is_named(tmp_path):
    finetune(network(), loader(), epochs=1, checkpoints=tmp_path, progress=False)
    for file in sorted((tmp_path / "epoch-0001").iterdir()):
        whole = file.read_bytes()
        one_bit = bytearray(whole)
        one_bit[len(whole) // 2] ^= 1
        for damaged in (whole[:100], bytes(len(whole)), bytes(one_bit), None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            model = network()
            with pytest.raises(ValueError, match=rf"{tmp_path}/epoch-0001: cannot be .*: start in a new folder"):
                finetune(model, loader(), epochs=2, checkpoints=tmp_path, resume=True, progress=False)
            assert same(model, network())
        file.write_bytes(whole)
    (tmp_path / "epoch-0001" / ".DS_Store").touch()  # which is none of its files
    finetune(network(), loader(), epochs=2, checkpoints=tmp_path, resume=True, progress=False)
    file = tmp_path / "epoch-0002" / "model.safetensors"
    for resume in (False, True):
        with pytest.raises(OSError, match=r"model.safetensors: cannot be written .*; give a folder that can"):
            finetune(network(), None, epochs=2, checkpoints=file.parent / "model.safetensors", resume=resume)


def test_two_runs_do_not_share_a_folder_of_states(tmp_path):
    def again(_):
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"{tmp_path}: another run is at work there: wait for it, or give an"):
                finetune(network(), loader(), epochs=1, checkpoints=tmp_path, resume=resume, progress=False)

    finetune(network(), loader(), epochs=1, checkpoints=tmp_path, progress=False, after_epoch=again)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001"]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_somebody_has_switched_gradients_off(around):
    model, twin = network(), network()
    finetune(twin, loader(), epochs=1, progress=False)
    with around():
        finetune(model, loader(), epochs=1, progress=False)
        assert not torch.is_grad_enabled()
    assert same(model, twin)


def test_a_state_of_another_network_is_refused_before_it_is_loaded(tmp_path):
    finetune(network(), loader(), epochs=1, checkpoints=tmp_path, progress=False)
    for other, message in (
        (CifarResNet((1, 1, 1), num_classes=11), r"linear.bias is of shape \(10,\) there and of shape \(11,\) here"),
        (CifarResNet((2, 1, 1)), "layer1.1.conv1.weight is missing there and of shape"),
    ):
        before = copy.deepcopy(other)
        with pytest.raises(ValueError, match=message):
            finetune(other, loader(), epochs=2, checkpoints=tmp_path, resume=True, progress=False)
        assert same(other, before)


def test_what_a_loop_before_has_left_does_not_count():
    clean, used = network(), network()
    expected = finetune(clean, loader(), epochs=1, progress=False)
    (1000 * used.train()(torch.randn(4, 3, 8, 8))).sum().backward()
    used.load_state_dict(network().state_dict())
    assert [e.loss for e in finetune(used, loader(), epochs=1, progress=False)] == [e.loss for e in expected]
    assert same(clean, used)


def test_a_forward_of_the_model_itself_and_the_precision_are_left_alone():
    model = network()
    model.forward = own = lambda x: CifarResNet.forward(model, x)
    finetune(model, loader(), epochs=1, progress=False)
    assert model.__dict__["forward"] is own
    assert not is_initialized()  # nor is accelerate's precision settled for what comes after


def test_what_nothing_can_be_learnt_from_is_named():
    model = network()
    for itself in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match="the teacher is the model itself"):
            finetune(model, loader(), teacher=itself)
    with pytest.raises(
        ValueError, match=r"the teacher returned NoneType for a batch: logits \(B, classes\) are needed"
    ):
        finetune(network(), loader(), teacher=lambda batch: None, progress=False)
    with pytest.raises(ValueError, match="no parameter of the CifarResNet requires a gradient"):
        finetune(network().requires_grad_(False), loader())
    with pytest.raises(ValueError, match=r"looks=0: at least 1"):
        CachedTeacher(model, 10, looks=0)
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        finetune(model, loader(), teacher=CachedTeacher(model, len(DATA)))
    with pytest.raises(ValueError, match="teacher='resnet56': a module, or a callable"):
        finetune(model, loader(), teacher="resnet56")
    with pytest.raises(ValueError, match=r"the teacher gives logits of shape \(64, 1\) and the model \(64, 10\)"):
        finetune(network(), loader(), teacher=CifarResNet((1, 1, 1), num_classes=1), progress=False)
    with pytest.raises(ValueError, match="val_loader can be read only once"):
        finetune(network(), loader(), iter(list(loader())), epochs=2)
    pairs = [(images, labels) for images, labels, _ in loader()]
    with pytest.raises(ValueError, match=r"needs batches \(images, labels, index\)"):
        finetune(network(), pairs, teacher=CachedTeacher(model, len(DATA)), epochs=1, progress=False)
    with pytest.raises(ValueError, match="a CachedTeacher for 10 images and a batch with number"):
        finetune(network(), loader(), teacher=CachedTeacher(model, 10), epochs=1, progress=False)


@pytest.mark.parametrize("validated", [False, True])
def test_weights_that_the_last_step_broke_are_not_kept(tmp_path, validated):
    one, options = list(loader())[:1], {"lr": 3e38, "warmup": 0.0, "epochs": 2, "progress": False}
    model = network()
    model.linear.weight.data *= 100  # gradients before it are large
    with pytest.raises(RuntimeError, match="epoch 1/2: the weights are not finite after the last step"):
        finetune(model, one, loader() if validated else None, checkpoints=tmp_path, **options)
    assert not states(tmp_path)


def test_a_resumed_run_does_not_ask_its_teacher_again(tmp_path):
    teacher, seen = network(1), []
    teacher.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    for epochs, asked in ((3, 2 * len(DATA)), (5, 2 * len(DATA))):
        cached = CachedTeacher(teacher, len(DATA), looks=2)
        finetune(network(), loader(), teacher=cached, epochs=epochs, checkpoints=tmp_path, resume=True, progress=False)
        assert sum(seen) == asked


def test_a_run_resumed_with_other_epochs_goes_on_along_their_cosine(tmp_path):
    numbers = {"epochs": np.int64(2), "lr": np.float64(0.1)}  # of a sweep
    first = finetune(network(), loader(), **numbers, checkpoints=tmp_path, progress=False)
    longer = finetune(network(), loader(), epochs=4, checkpoints=tmp_path, resume=True, progress=False)
    assert longer[:2] == first
    steps = len(loader())
    expected = [0.1 * warmup_cosine(epoch * steps, steps, 4 * steps) for epoch in (3, 4)]
    assert [epoch.lr for epoch in longer[2:]] == pytest.approx(expected)


def test_the_first_step_of_a_run_that_goes_on_has_the_rate_of_its_own_schedule(tmp_path, monkeypatch):
    steps, rates = len(loader()), []
    finetune(network(), loader(), epochs=2, checkpoints=tmp_path, progress=False)
    plain = torch.optim.SGD.step
    step = lambda self, *args: (rates.append(self.param_groups[0]["lr"]), plain(self, *args))[1]  # noqa: E731
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    finetune(network(), loader(), epochs=4, checkpoints=tmp_path, resume=True, progress=False)
    assert rates == pytest.approx([0.1 * warmup_cosine(2 * steps + i, steps, 4 * steps) for i in range(2 * steps)])


def test_somebodys_accumulation_neither_stops_ours_nor_is_changed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    mine = Accelerator(cpu=True)
    theirs, _ = mine.prepare(nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
    model, twin = network(), network()
    with mine.accumulate(theirs):
        assert not mine.sync_gradients
        finetune(model, loader(), epochs=1, progress=False)
        assert not mine.sync_gradients
        assert mine.gradient_accumulation_steps == 3
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    finetune(twin, loader(), epochs=1, progress=False)
    assert same(model, twin)
    assert not same(model, network())


def test_a_module_that_teaches_leaves_the_random_numbers_to_the_training():
    torch.manual_seed(0)
    expected = torch.rand(1)
    for teacher in (None, network(1)):
        torch.manual_seed(0)
        batches = [(torch.zeros(4, 3, 8, 8), torch.arange(4))] * 2
        dropping = nn.Sequential(nn.Dropout(), network())
        finetune(dropping, batches, teacher=teacher, epochs=1, progress=False)
        assert torch.rand(1) != expected


def test_a_torch_dataloader_of_dicts_and_a_module_as_teacher():
    rows = [{"x": x / 255, "labels": y} for x, y in zip(DATA.images[:64], DATA.labels[:64], strict=True)]
    model, teacher = network(), network(1).train()
    before = copy.deepcopy(teacher)
    assert len(finetune(model, DataLoader(rows, 16, shuffle=True), teacher=teacher, epochs=1, progress=False)) == 1
    assert same(before, teacher)
    assert teacher.training


def test_nan_stops_and_names_the_step(tmp_path):
    model = network()
    x = torch.randn(96, 3, 8, 8)
    x[70] = torch.nan
    batches = DataLoader(TensorDataset(x, torch.arange(96) % 10), 32)
    with pytest.raises(RuntimeError, match=r"epoch 1/2, step 3: the loss is nan; try a lower lr"):
        finetune(model, batches, epochs=2, checkpoints=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


class Flaky:
    """A loader whose first batch holds NaN the first `times` times."""

    def __init__(self, times: int) -> None:
        self.loader, self.times = loader(), times

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __iter__(self):
        for images, *rest in self.loader:
            self.times -= 1
            yield (images * torch.nan if self.times >= 0 else images, *rest)


def test_after_a_loss_that_is_no_number_it_goes_on_with_half_the_rate(tmp_path):
    expected, halved = network(), network()
    calm = finetune(expected, loader(), epochs=2, lr=0.05, progress=False)
    history = finetune(halved, Flaky(times=1), epochs=2, lr=0.1, halvings=1, checkpoints=tmp_path / "a", progress=False)
    assert same(expected, halved)
    assert [epoch.lr for epoch in history] == [epoch.lr for epoch in calm]
    with pytest.raises(RuntimeError, match="the loss is nan"):
        finetune(network(), Flaky(99), epochs=2, halvings=2, checkpoints=tmp_path / "b", progress=False)
    assert [state.name for state in states(tmp_path / "b")] == ["epoch-0000"]
    options = {"checkpoints": tmp_path / "c", "progress": False}
    finetune(network(), Flaky(2), epochs=1, halvings=2, **options)
    with pytest.raises(RuntimeError, match="the loss is nan"):  # halved more often than that before
        finetune(network(), Flaky(99), epochs=2, halvings=1, resume=True, **options)
    with pytest.raises(ValueError, match="halvings=1 needs checkpoints=FOLDER"):
        finetune(network(), loader(), halvings=1)
    with pytest.raises(ValueError, match="halvings=-1: at least 0"):
        finetune(network(), loader(), halvings=-1, checkpoints=tmp_path / "d")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [({"epochs": 0}, "epochs=0"), ({"lr": -1}, "lr=-1"), ({"distill": 2}, "distill=2"), ({"momentum": 1}, "momentum=1"),
     ({"temperature": 0}, "temperature=0"), ({"lr": math.nan}, "lr=nan"), ({"epochs": math.nan}, "epochs=nan"),
     ({"epochs": 2.5}, "epochs=2.5"), ({"epochs": "1"}, "epochs='1': a number"),
     ({"temperature": math.inf}, "temperature=inf")],
)  # fmt: skip
def test_recipes_out_of_range(recipe, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**recipe)


def test_a_model_in_half_precision_is_trained_without_autocast(monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", lambda device: torch.bfloat16)
    model = network().half()
    assert len(finetune(model, [(torch.randn(20, 3, 8, 8).half(), torch.arange(20) % 10)], epochs=1, lr=1e-3)) == 1
    assert model.conv1.weight.dtype == torch.float16


@pytest.mark.parametrize("around", [copy.copy, nn.Sequential], ids=["shallow copy", "wrapper"])
def test_a_teacher_of_the_same_weights_is_refused(around):
    model = network()
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        finetune(model, loader(), teacher=around(model), epochs=1)


def test_labels_out_of_range_are_named():
    batches = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) + 5), 4)
    with pytest.raises(ValueError, match="labels from 9 to 12 with 10 classes"):
        finetune(network(), batches, epochs=1, progress=False)


@pytest.mark.parametrize("labels", [torch.zeros(4, 1).long(), torch.zeros(4), torch.eye(10)[:4].long()])
def test_labels_of_another_form_are_named(labels):
    batches = [(torch.randn(4, 3, 8, 8), labels)]
    with pytest.raises(ValueError, match=r"labels are \(4,\) integers or \(4, 10\) probabilities; given torch"):
        finetune(network(), batches, epochs=1, progress=False)


def test_a_batch_without_samples_is_named():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    for batches in ([(images, labels), (images[:0], labels[:0])], [(images[:0], labels[:0])]):
        with pytest.raises(ValueError, match="gives a batch without samples, whose loss is no number: leave it out"):
            finetune(network(), batches, epochs=1, progress=False)


def test_a_short_run_rises_for_half_of_it_at_most():
    assert [warmup_cosine(step, 100, 4) for step in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0])


def test_loaders_without_length_or_batches_are_named():
    with pytest.raises(ValueError, match="generator has no length"):
        finetune(network(), (batch for batch in loader()), epochs=1)
    with pytest.raises(ValueError, match="gives no batch"):
        finetune(network(), ImageLoader(DATA, 300, shuffle=True), epochs=1)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(DATA.images, DATA.labels, strict=True)

    with pytest.raises(ValueError, match="DataLoader has no length"):
        finetune(network(), DataLoader(Stream(), 8), epochs=1)


def plain_network() -> nn.Module:
    """Without batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))


def trained(batch_size: int, **options) -> tuple[nn.Module, dict[str, list]]:
    """One run from `ImageLoader`, interrupted and resumed, and one from a torch DataLoader, with a batch each."""
    model, torch_model = plain_network(), plain_network()
    images = ImageLoader(DATA, batch_size, pad=1, shuffle=True)
    common = {"val_loader": ImageLoader(DATA, 100), "teacher": plain_network(), "lr": 0.05, "progress": False}
    finetune(model, images, epochs=2, **common, **options)
    mine = finetune(model, images, epochs=3, resume=True, **common, **options)
    rows = TensorDataset(DATA.images.float() / 255, DATA.labels)
    theirs = finetune(torch_model, DataLoader(rows, batch_size), epochs=2, **common)
    return model, {"images": [asdict(epoch) for epoch in mine], "torch": [asdict(epoch) for epoch in theirs]}


class Telling(CachedTeacher):
    """Tells this process to end when it is asked for the `at`-th time."""

    asked, at = 0, 0

    def __call__(self, batch) -> torch.Tensor:
        self.asked += 1
        if self.asked == self.at:
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(batch)


def broken_off(folder: Path, at: int = 0, shuffled: bool = False) -> nn.Module:
    """One run, from the newest state in `folder` on; this process is told to end in its step `at`."""
    model, teacher = plain_network(), Telling(plain_network(), len(DATA), looks=2)
    teacher.at = at
    rows = TensorDataset(DATA.images.float() / 255, DATA.labels, torch.arange(len(DATA)))
    images = DataLoader(rows, 64, shuffle=True) if shuffled else loader()
    finetune(model, images, teacher=teacher, epochs=4, lr=0.05, checkpoints=folder, resume=True, progress=False)
    return model


def in_float32(device: torch.device) -> None:
    """As `autocast_dtype` where bfloat16 gains nothing."""


def full_disk(*_: object, **__: object) -> None:
    raise OSError("No space left")


def learn(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    module.autocast_dtype = in_float32
    model, history = trained(32, checkpoints=folder / "states")
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(history))
    module.Means.every = 1  # steps between the looks at what the others are told
    for shuffled in (False, True):
        broken, alone = (folder / f"{name}-{shuffled}" for name in ("broken", "alone"))
        with pytest.raises(SystemExit, match="143"):
            broken_off(broken, 3 if rank else 0, shuffled)
        assert [state.name for state in states(broken)] == ["epoch-0001-step-0000001"]
        assert same(broken_off(broken, 0, shuffled), broken_off(alone, 0, shuffled))
    in_step = network()
    finetune(in_step, loader(), epochs=1, progress=False)
    torch.save(dict(in_step.named_buffers()), folder / f"{rank}-buffers.pt")
    if rank == 0:  # while the other one writes what is its own
        accelerate.accelerator.save_accelerator_state = full_disk
    with pytest.raises(OSError, match=r"state after epoch 1 cannot be written \(No space left\); is the disk full\?"):
        finetune(network(), loader(), epochs=1, checkpoints=folder / "full", progress=False)
    torch.distributed.barrier()  # the first tidies up
    assert not list((folder / "full").iterdir())
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_learns_from_batches_twice_as_large(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "autocast_dtype", in_float32)  # bfloat16 rounds sums of other orders apart
    in_two(learn, tmp_path, tmp_path)
    first, other = (torch.load(tmp_path / f"{rank}-buffers.pt", weights_only=True) for rank in range(2))
    assert first
    assert all(torch.equal(first[name], other[name]) for name in first)
    one, history = trained(64, checkpoints=tmp_path / "one")
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        shared = json.loads((tmp_path / f"{rank}.json").read_text())
        for loader in ("images", "torch"):
            for key in ("epoch", "loss", "lr", "top1"):
                expected = [epoch[key] for epoch in history[loader]]
                assert [epoch[key] for epoch in shared[loader]] == pytest.approx(expected, rel=1e-4, abs=1e-6)


class Tied(CifarResNet):
    """With a second name for one of its weights."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1))
        self.again = self.linear.weight


def test_a_network_with_tied_weights_goes_on(tmp_path):
    finetune(Tied(), loader(), epochs=1, checkpoints=tmp_path, progress=False)
    done = finetune(Tied(), loader(), epochs=2, checkpoints=tmp_path, resume=True, progress=False)
    assert len(done) == 2
