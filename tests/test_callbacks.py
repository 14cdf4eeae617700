"""Pruning inside the real trainers of Lightning and transformers."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import modprune
from modprune.callbacks.lightning import PruningCallback as LightningCallback
from modprune.callbacks.transformers import PruningCallback as TransformersCallback
from modprune.data import digits
from modprune.models import resnet20
from modprune.surgery import removed_blocks

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers
DATA = digits(True).subset(torch.arange(256))
ROWS = [{"pixel_values": x / 255, "labels": y} for x, y in zip(DATA.images, DATA.labels, strict=True)]
BATCHES = DataLoader(TensorDataset(DATA.images[:128] / 255, DATA.labels[:128]), 32)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = resnet20()
        self.losses: list[float] = []
        self.sizes: list[int] = []
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(float(loss))
        self.sizes.append(modprune.count_params(self.network))
        self.seen.append(batch[1])
        return loss

    def validation_step(self, batch, _):
        self.log("loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def train(*callbacks, epochs=4, checkpoint=None, ckpt_path=None, make=Classifier, batches=BATCHES, **options):
    module = make()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=checkpoint is not None,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, *([checkpoint] if checkpoint else [])], **options,
    )  # fmt: skip
    trainer.fit(module, batches, batches, ckpt_path=ckpt_path)
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


def test_lightning_goes_on_from_a_checkpoint_of_its_own(tmp_path):
    options = {"network": "network", "at": (1, 3), "blocks": 4, "shares": (0.5, 1), "criterion": "l1_norm"}
    saved = lambda: ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)  # noqa: E731
    through, trainer = train(LightningCallback(**options), checkpoint=saved())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch={i}.ckpt" for i in range(4)]
    for epoch in range(3):
        module, _ = train(LightningCallback(**options), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert module.losses == through.losses[4 * (epoch + 1) :]
        assert module.network.state_dict().keys() == through.network.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), through.parameters(), strict=True))
    trainer.fit_loop.max_epochs = 5
    trainer.fit(through, BATCHES)  # on in the same process: what has been met is not asked for again
    assert len(through.losses) == 20
    assert through.sizes[-1] == through.sizes[12]


def test_what_says_when_is_asked_once_for_each_epoch(tmp_path):
    options = {"network": "network", "blocks": 4, "shares": (0.5, 1), "criterion": "l1_norm"}
    options["at"] = lambda count, _: count % 2 == 0
    through, _ = train(LightningCallback(**options), checkpoint=ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    monitored = ModelCheckpoint(tmp_path / "monitored", "{epoch}", save_top_k=-1, monitor="loss")  # before the stage
    train(LightningCallback(**options), checkpoint=monitored)
    for folder in (tmp_path, tmp_path / "monitored"):
        for epoch in range(3):
            module, _ = train(LightningCallback(**options), ckpt_path=folder / f"epoch={epoch}.ckpt")
            assert module.sizes == through.sizes[4 * (epoch + 1) :]
            assert module.losses == through.losses[4 * (epoch + 1) :]


def test_lightning_loses_no_stage_at_the_last_step_of_an_epoch(tmp_path):
    options = {"network": "network", "at": (1, 3), "blocks": 4, "shares": (0.5, 1), "criterion": "l1_norm"}
    through, _ = train(LightningCallback(**options), checkpoint=ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1
    ))  # fmt: skip
    for step in (3, 4, 5, 12):
        module, _ = train(LightningCallback(**options), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert module.sizes == through.sizes[step:]


def test_lightning_state_is_that_of_the_module_it_came_with(tmp_path):
    options = {"network": "network", "at": (2,), "blocks": 2, "criterion": "l1_norm"}
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module, trainer = train(LightningCallback(**options), epochs=2, checkpoint=saved)
    with pytest.raises(ValueError, match=r"the model has lost .* since that state: give it as it was first, whole"):
        trainer.validate(module, BATCHES, ckpt_path=tmp_path / "epoch=0.ckpt")
    callback = LightningCallback(**options)
    fresh = Classifier()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[callback],
    )  # fmt: skip
    trainer.validate(fresh, BATCHES, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert removed_blocks(fresh.network) == removed_blocks(module.network)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    again, _ = train(LightningCallback(**options), epochs=3, ckpt_path=tmp_path / "again.ckpt")
    assert removed_blocks(again.network) == removed_blocks(module.network)
    other = Classifier()
    trainer.fit(other, BATCHES)
    assert not removed_blocks(other.network).remove
    assert "load_model_state_dict" not in vars(trainer.strategy)
    callback.on_train_epoch_end(SimpleNamespace(current_epoch=1, optimizers=trainer.optimizers, callbacks=[]), other)
    assert len(removed_blocks(other.network).remove) == 2
    trainer.validate(Classifier(), BATCHES, ckpt_path=tmp_path / "epoch=0.ckpt")
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.validate(again := Classifier(), BATCHES, ckpt_path=tmp_path / "whole.ckpt")
    assert not removed_blocks(again.network).remove


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


class Bytes(Classifier):
    def on_before_batch_transfer(self, batch, _):
        return batch["images"], batch["classes"]

    def on_after_batch_transfer(self, batch, _):
        return batch[0].float() / 255, batch[1]


def test_lightning_measures_the_batches_that_the_step_gets():
    criterion = modprune.criteria.Modularity(samples=100, repeats=1)
    rows = [{"images": x, "classes": y} for x, y in zip(DATA.images, DATA.labels, strict=True)]
    for given in (
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"make": Bytes, "batches": DataLoader(rows[:128], 32)},
    ):
        callback = LightningCallback(network="network", at=(1,), blocks=2, criterion=criterion)
        module, _ = train(callback, epochs=2, **given)
        assert len(removed_blocks(module.network).remove) == 2


def test_lightning_goes_on_with_the_batches_that_it_would_have_had():
    orders = []
    for callbacks in ([], [LightningCallback(network="network", at=(1,), blocks=1, criterion="block_influence")]):
        own = torch.Generator().manual_seed(0)
        shuffled = DataLoader(BATCHES.dataset, 32, True, num_workers=1, persistent_workers=True, generator=own)
        orders.append(torch.cat(train(*callbacks, epochs=2, batches=shuffled)[0].seen))
    assert torch.equal(*orders)


def test_averages_of_lightning_lose_the_same_blocks(tmp_path):
    options = {"network": "network", "at": (1, 2), "blocks": 4, "shares": (0.5, 1), "criterion": "l1_norm"}
    plain, _ = train(LightningCallback(**options))
    same = lambda a, b: all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))  # noqa: E731
    for order in (1, -1):
        callbacks = [LightningCallback(**options), EMAWeightAveraging(decay=0.0)][::order]  # the last step's weights
        saved = ModelCheckpoint(tmp_path / str(order), "{epoch}", save_top_k=-1)
        assert same(train(*callbacks, checkpoint=saved)[0], plain)
        callbacks = [LightningCallback(**options), EMAWeightAveraging(decay=0.0)][::order]
        assert same(train(*callbacks, ckpt_path=tmp_path / str(order) / "epoch=1.ckpt")[0], plain)
    module, _ = train(LightningCallback(**options), StochasticWeightAveraging(0.005, swa_epoch_start=1))
    assert len(removed_blocks(module.network).remove) == 4


def test_transformers_counts_whole_epochs():
    asked: list[int] = []
    callback = TransformersCallback(at=(1,), blocks=1)
    callback.pruning = lambda count, _: asked.append(count)
    for epoch in (0.9999999999, 1.6, 2.0):
        callback.on_epoch_end(None, SimpleNamespace(epoch=epoch), None, optimizer=None)
    assert asked == [1, 1, 2]


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
        num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def convnext():
    """Whose names in checkpoints are those in the module: resuming a ViT, transformers 5 finds none of its layers."""
    sizes = {"patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [3, 3]}
    config = transformers.ConvNextConfig(**sizes, num_labels=10)
    return transformers.ConvNextForImageClassification(config)


def trainer_of(make, folder, callback, **options):
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=folder, num_train_epochs=3, per_device_train_batch_size=32, learning_rate=2e-3, report_to=[],
        logging_steps=8, disable_tqdm=True, use_cpu=True, **({"save_strategy": "epoch"} | options),
    )  # fmt: skip
    return transformers.Trainer(make(), arguments, train_dataset=ROWS, callbacks=[callback])


def test_transformers_goes_on_from_a_checkpoint_of_its_own(tmp_path):
    options = {"at": (1, 2), "blocks": 2, "shares": (0.5, 1), "criterion": "l1_norm"}
    through = trainer_of(convnext, tmp_path, TransformersCallback(**options))
    through.train()
    for step in (8, 16, 24):
        checkpoint = tmp_path / f"checkpoint-{step}"
        callback = TransformersCallback(**options)
        trainer = trainer_of(convnext, tmp_path / "again", callback)
        callback.resume(trainer.model, checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        state = trainer.model.state_dict()
        assert state.keys() == through.model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in through.model.state_dict().items())
    assert [len(plan.remove) for plan in callback.pruning.plans] == [1, 1]
    (checkpoint / "modprune.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-24/modprune.json: not there, nor all weights: the train"):
        callback.resume(convnext(), checkpoint)


def test_transformers_loses_no_stage_at_the_last_step_of_an_epoch(tmp_path):
    options = {"at": (1, 2), "blocks": 2, "shares": (0.5, 1), "criterion": "l1_norm"}
    trainer_of(convnext, tmp_path, TransformersCallback(**options), save_strategy="steps", save_steps=4).train()
    for step, gone in ((4, 0), (8, 1), (12, 1), (16, 2)):  # of 8 an epoch
        callback = TransformersCallback(**options)
        trainer = trainer_of(convnext, tmp_path / "again", callback)
        callback.resume(trainer.model, tmp_path / f"checkpoint-{step}")
        begun = []
        callback.on_step_begin = lambda *_, model, **__: begun.append(len(removed_blocks(model).remove))  # noqa: B023
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert begun[0] == gone
        assert begun[-1] == 2


def test_transformers_that_goes_on_without_what_had_gone_is_told(tmp_path):
    options = {"at": (1, 2), "blocks": 2, "shares": (0.5, 1), "criterion": "l1_norm"}
    trainer_of(convnext, tmp_path, TransformersCallback(**options), save_only_model=True).train()
    checkpoint = str(tmp_path / "checkpoint-8")
    with pytest.raises(RuntimeError, match=r"goes on from step 8: call callback.resume\(trainer.model, checkpoint\)"):
        trainer_of(convnext, tmp_path / "again", TransformersCallback(**options)).train(checkpoint)
    trainer = trainer_of(convnext, tmp_path / "again", callback := TransformersCallback(**options))
    callback.resume(convnext(), checkpoint)
    with pytest.raises(RuntimeError, match="resume was given another model than is trained"):
        trainer.train(checkpoint)


def test_transformers_prunes_from_a_checkpoint_of_a_training_without_it(tmp_path):
    trainer_of(convnext, tmp_path, transformers.TrainerCallback()).train()
    callback = TransformersCallback(at=(2,), blocks=2, criterion="l1_norm")
    trainer = trainer_of(convnext, tmp_path / "again", callback)
    callback.resume(trainer.model, tmp_path / "checkpoint-8")
    assert not removed_blocks(trainer.model).remove
    trainer.train(str(tmp_path / "checkpoint-8"))
    assert len(removed_blocks(trainer.model).remove) == 2


def test_transformers_asks_once_for_each_epoch(tmp_path):
    options = {"at": lambda count, _: count % 2 == 1, "blocks": 2, "shares": (0.5, 1), "criterion": "l1_norm"}
    trainer_of(convnext, tmp_path, TransformersCallback(**options)).train()
    callback = TransformersCallback(**options)
    trainer = trainer_of(convnext, tmp_path / "again", callback)
    callback.resume(trainer.model, tmp_path / "checkpoint-8")
    gone = []
    callback.on_step_begin = lambda *_, model, **__: gone.append(len(removed_blocks(model).remove))
    trainer.train(str(tmp_path / "checkpoint-8"))
    assert gone == [1] * 16
    assert len(removed_blocks(trainer.model).remove) == 2


def test_transformers_goes_on_from_adapters_that_have_other_names_in_the_model(tmp_path):
    trainer_of(convnext, tmp_path, TransformersCallback(at=(1,), blocks=2, criterion="l1_norm")).train()
    checkpoint = tmp_path / "checkpoint-16"
    (checkpoint / "model.safetensors").unlink()
    save_file({"base_model.model.classifier.lora_A.weight": torch.zeros(1)}, checkpoint / "adapter_model.safetensors")
    gone = []
    for _ in range(2):
        callback, model = TransformersCallback(at=(1,), blocks=2, criterion="l1_norm"), convnext()
        callback.resume(model, checkpoint)
        gone.append(len(removed_blocks(model).remove))
        (checkpoint / "modprune.json").unlink(missing_ok=True)  # as of a training without the callback
    assert gone == [2, 0]


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 saves under the names in memory"
)
def test_transformers_that_saves_under_other_names_is_told(tmp_path):
    callback = TransformersCallback(at=(1,), blocks=1, criterion="l1_norm")
    trainer_of(vit, tmp_path, callback).train()
    whole = vit()
    with pytest.raises(ValueError, match=r"checkpoint-8: its vit.encoder.* is unknown to the ViTForImage"):
        callback.resume(whole, tmp_path / "checkpoint-8")
    assert not removed_blocks(whole).remove
    (tmp_path / "checkpoint-8" / "modprune.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-8/modprune.json: not JSON: take an earlier checkpoint"):
        callback.resume(whole, tmp_path / "checkpoint-8")


def test_transformers_prunes_and_goes_on_learning(tmp_path):
    callback = TransformersCallback(at=(1,), blocks=2, criterion=modprune.criteria.Modularity(samples=100, repeats=2))
    trainer = trainer_of(vit, tmp_path, callback)
    model = trainer.model
    trainer.train()
    assert callback.pruning is not None
    assert len(callback.pruning.plans[0].remove) == 2
    assert len(modprune.find_blocks(model, {"pixel_values": ROWS[0]["pixel_values"][None]})) == 2
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
