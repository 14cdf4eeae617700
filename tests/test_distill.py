"""Learning from a teacher: the loss by hand, and a teacher that remembers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modprune.data import ImageLoader, digits
from modprune.distill import CachedTeacher, distillation_loss, logits_of
from modprune.finetune import finetune
from modprune.models import CifarResNet

DATA = digits(True).subset(torch.arange(256))


def test_the_loss_by_hand():
    student, teacher, labels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    p, q = F.softmax(teacher / 2, 1), F.softmax(student / 2, 1)
    by_hand = 0.7 * 4 * (p * (p / q).log()).sum(1).mean() + 0.3 * F.cross_entropy(student, labels)
    assert distillation_loss(student, labels, teacher, 0.7, 2.0) == pytest.approx(by_hand.item(), rel=1e-5)
    assert distillation_loss(student, labels, None, 0.7, 2.0) == F.cross_entropy(student, labels)
    assert distillation_loss(teacher, None, teacher, 1.0, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_a_pixel_weighs_what_an_image_does():
    student, teacher, labels = torch.randn(5, 3, 4, 2), torch.randn(5, 3, 4, 2), torch.randint(3, (5, 4, 2))
    rows = [logits.movedim(1, -1).flatten(0, -2) for logits in (student, teacher)]
    expected = distillation_loss(rows[0], labels.flatten(), rows[1], 0.7, 2.0)
    assert distillation_loss(student, labels, teacher, 0.7, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_nothing_can_be_learnt_from_is_named():
    with pytest.raises(ValueError, match=r"the batches hold no labels: give .* or a teacher and distill=1"):
        distillation_loss(torch.randn(5, 3), None, None, 0.7, 2.0)
    with pytest.raises(ValueError, match="the model returned str, which holds no tensor to take as logits"):
        logits_of("cat")
    batch = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4).long(), torch.arange(2)
    with pytest.raises(ValueError, match=r"a CachedTeacher .* \(B, classes\) .* shape \(2, 5, 4, 4\): give the module"):
        CachedTeacher(torch.nn.Conv2d(3, 5, 1), 10)(batch)


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (1, torch.ones(4, 1), r"logits of shape \(4, 1\): \(B, classes\), at least two"),
        (None, torch.ones(4), r"logits of shape \(4,\): \(B, classes\), at least two"),
        (3, torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]), "sum to 2, not to 1"),
        (3, torch.ones(4, dtype=torch.int64)[:, None], r"labels are \(4,\) integers or \(4, 3\) probabilities"),
    ],
)
def test_what_a_softmax_cannot_learn_is_refused(outputs, labels, message):
    """One output, several classes at a time: cross-entropy would train on, and learn nothing or something else."""
    model = nn.Sequential(nn.Linear(5, outputs or 1), nn.Identity() if outputs else nn.Flatten(0))
    with pytest.raises(ValueError, match=message):
        finetune(model, [(torch.randn(4, 5), labels)], epochs=1, progress=False)


def test_probabilities_of_classes_are_learnt_from_however_they_are_rounded():
    model = nn.Linear(5, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        labels = torch.rand(64, 3).softmax(1).to(dtype)
        assert len(finetune(model, [(torch.randn(64, 5), labels)], epochs=1, progress=False)) == 1


def test_a_cached_teacher_answers_the_mean_of_what_it_has_said():
    teacher = CifarResNet((1, 1, 1)).train()
    reference = copy.deepcopy(teacher).eval()
    cached, data = CachedTeacher(teacher, len(DATA), looks=3), ImageLoader(DATA, 64, pad=1, shuffle=True)
    said = torch.zeros(len(DATA), 10)
    for epoch in range(5):
        for batch in data:
            images, _, index = batch
            with torch.no_grad():
                said[index] += reference(images) if epoch < 3 else 0
            assert torch.allclose(cached(batch), said[index] / min(epoch + 1, 3), atol=1e-4)
    assert teacher.training


def test_a_cached_teacher_looks_at_each_image_so_many_times():
    teacher, seen = CifarResNet((1, 1, 1)), []
    teacher.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    data = ImageLoader(DATA, 96, pad=1, shuffle=True)  # two batches an epoch: 64 of 256 images are left out
    cached = CachedTeacher(teacher, len(DATA), looks=2)
    for _ in range(16):
        for batch in data:
            cached(batch)
    assert sum(seen) == 2 * len(DATA)
    again = CachedTeacher(teacher, len(DATA), looks=2)
    again.load_state_dict(cached.state_dict())
    assert torch.equal(again(batch), cached(batch))
    assert sum(seen) == 2 * len(DATA)


def test_a_teacher_of_ones_own_learns_nothing():
    teachers = [CifarResNet((1, 1, 1)).eval() for _ in range(2)]
    loader = ImageLoader(DATA.subset(torch.arange(64)), 64)
    finetune(CifarResNet((1, 1, 1)), loader, teacher=lambda batch: sum(t(batch[0]) for t in teachers) / 2, epochs=1)
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())
