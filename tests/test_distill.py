"""Learning from a teacher: the loss by hand, and a teacher that remembers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from modprune.data import ImageLoader, digits
from modprune.distill import CachedTeacher, distillation_loss
from modprune.models import CifarResNet

DATA = digits(True).subset(torch.arange(256))


def test_the_loss_by_hand():
    student, teacher, labels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    p, q = F.softmax(teacher / 2, 1), F.softmax(student / 2, 1)
    by_hand = 0.7 * 4 * (p * (p / q).log()).sum(1).mean() + 0.3 * F.cross_entropy(student, labels)
    assert distillation_loss(student, labels, teacher, 0.7, 2.0) == pytest.approx(by_hand.item(), rel=1e-5)
    assert distillation_loss(student, labels, None, 0.7, 2.0) == F.cross_entropy(student, labels)
    assert distillation_loss(teacher, None, teacher, 1.0, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_a_cached_teacher_says_what_the_teacher_says_and_looks_once():
    teacher = CifarResNet((1, 1, 1)).train()
    data = ImageLoader(DATA, 64, pad=1, shuffle=True, views=2)
    seen = []
    hook = teacher.register_forward_hook(lambda *_: seen.append(1))
    cached = CachedTeacher(teacher, data)
    for epoch in range(4):
        data.set_epoch(epoch)
        for batch in data:
            logits = cached(batch)
            if epoch > 1:
                hook.remove()
                with torch.no_grad():
                    assert torch.allclose(logits, copy.deepcopy(teacher).eval()(batch[0]), atol=1e-4)
    # Each epoch drops what does not fill a batch: 256 = 4 x 64, so all is seen in two views.
    assert len(seen) == 8
    assert teacher.training


def test_a_cached_teacher_looks_only_at_what_it_has_not_seen():
    teacher, seen = CifarResNet((1, 1, 1)), []
    teacher.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    data = ImageLoader(DATA, 96, pad=1, shuffle=True, views=1)  # two batches an epoch: 64 of 256 images are left out
    cached = CachedTeacher(teacher, data)
    for epoch in range(12):
        data.set_epoch(epoch)
        for batch in data:
            assert torch.equal(cached(batch), cached(batch))
    assert sum(seen) == len(DATA)
    again = CachedTeacher(teacher, data)
    again.load_state_dict(cached.state_dict())
    assert torch.equal(again(batch), cached(batch))
    assert sum(seen) == len(DATA)
