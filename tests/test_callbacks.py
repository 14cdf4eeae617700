"""Pruning inside the real trainers of Lightning and transformers."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader, TensorDataset

import modprune
from modprune.callbacks.lightning import PruningCallback as LightningCallback
from modprune.callbacks.transformers import PruningCallback as TransformersCallback
from modprune.data import digits
from modprune.models import resnet20

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers
DATA = digits(True).subset(torch.arange(256))


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = resnet20()
        self.losses: list[float] = []
        self.sizes: list[int] = []

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(float(loss))
        self.sizes.append(modprune.count_params(self.network))
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def train(callback: pl.Callback, epochs: int = 4, **options: int) -> tuple[Classifier, pl.Trainer]:
    module = Classifier()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(DATA.images / 255, DATA.labels), 64))
    return module, trainer


def test_lightning_prunes_at_its_epochs_and_goes_on_learning(tmp_path):
    callback = LightningCallback(network="network", at=(1, 3), blocks=4, shares=(0.5, 1), criterion="l1_norm")
    module, trainer = train(callback)
    per_epoch = [module.sizes[i : i + 4] for i in range(0, 16, 4)]
    assert all(len(set(sizes)) == 1 for sizes in per_epoch)
    assert per_epoch[0][0] > per_epoch[1][0] == per_epoch[2][0] > per_epoch[3][0]
    assert sum(module.losses[-4:]) < sum(module.losses[:4])
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4
    assert set(trainer.optimizers[0].state) == set(module.network.parameters())
    modprune.save(module.network, tmp_path / "m.safetensors")
    images = DATA.images[:8] / 255
    loaded = modprune.load(tmp_path / "m.safetensors", resnet20())
    assert torch.equal(loaded.eval()(images), module.network.eval()(images))


def test_lightning_prunes_at_a_step_by_modularity():
    callback = LightningCallback(
        network="network", every="step", at=(5,), blocks=1, criterion=modprune.criteria.Modularity(samples=100)
    )
    module, _ = train(callback, epochs=2)
    assert module.sizes[:5] == [269722] * 5
    assert len(set(module.sizes[5:])) == 1
    assert module.sizes[5] < 269722


def test_lightning_counts_steps_of_the_optimizer():
    asked: list[int] = []
    due = lambda count, _: asked.append(count) or count == 2  # noqa: E731
    callback = LightningCallback(
        network="network", every="step", at=due, shares=(0.5, 1), blocks=2, criterion="l1_norm"
    )
    train(callback, epochs=2, accumulate_grad_batches=2)
    assert asked == [1, 2, 3, 4]
    assert len(callback.pruning.plans) == 1


def test_transformers_counts_whole_epochs():
    asked: list[int] = []
    callback = TransformersCallback(at=(1,), blocks=1)
    callback.pruning = lambda count, _: asked.append(count)
    for epoch in (0.9999999999, 1.6, 2.0):
        callback.on_epoch_end(None, SimpleNamespace(epoch=epoch), None, optimizer=None)
    assert asked == [1, 1, 2]


def test_transformers_prunes_and_goes_on_learning(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
        num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    rows = [{"pixel_values": x / 255, "labels": y} for x, y in zip(DATA.images, DATA.labels, strict=True)]
    callback = TransformersCallback(at=(1,), blocks=2, criterion=modprune.criteria.Modularity(samples=100, repeats=2))
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, num_train_epochs=3, per_device_train_batch_size=32, learning_rate=2e-3, report_to=[],
        save_strategy="no", logging_steps=8, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert callback.pruning is not None
    assert len(callback.pruning.plans[0].remove) == 2
    assert len(modprune.find_blocks(model, {"pixel_values": rows[0]["pixel_values"][None]})) == 2
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    stepped = trainer.optimizer.state
    assert all(stepped[p]["step"] == 24 for p in model.parameters() if p in stepped)
    assert len(stepped) == len(list(model.parameters()))


def test_several_processes_are_refused_with_the_reason():
    with pytest.raises(RuntimeError, match=r"2 processes: Lightning has wrapped the module already; prune it before"):
        LightningCallback(at=(1,), blocks=1).on_train_start(SimpleNamespace(world_size=2), Classifier())
    with pytest.raises(RuntimeError, match=r"2 processes: the Trainer has wrapped the model already; prune it before"):
        TransformersCallback(at=(1,), blocks=1).on_train_begin(SimpleNamespace(world_size=2), None, None)


@pytest.mark.parametrize("callback", [LightningCallback, TransformersCallback])
def test_what_is_counted_is_named(callback):
    with pytest.raises(ValueError, match="every='day': 'epoch' or 'step' is needed"):
        callback(every="day", at=(1,), blocks=1)
