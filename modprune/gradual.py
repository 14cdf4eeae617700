"""Pruning in stages while somebody else's loop trains: when, how much, and the optimizer carried over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from modprune._bare import check_bare
from modprune._files import to_json
from modprune._inputs import first_sample, is_whole
from modprune._random import undisturbed
from modprune.budget import Budget
from modprune.carry import carry_over
from modprune.cost import count_macs, count_params
from modprune.criteria import Criterion, Random, resolve
from modprune.curve import ModularityCurve, modularity_curve
from modprune.plan import PruningPlan
from modprune.pruner import ModularityPruner
from modprune.surgery import removed_blocks


def cubic(stages: int) -> tuple[float, ...]:
    """Shares of the budget after each of `stages` stages: much at first, little at the end.

    Zhu and Gupta, "To prune, or not to prune" (2017), equation 1.

    >>> cubic(2)
    (0.875, 1.0)
    """
    return tuple(1 - (1 - stage / stages) ** 3 for stage in range(1, stages + 1))


class Settled:
    """Whether the modularity curve has come to rest: no point of it moved by more than `tolerance` since the last look.

    Args:
        loader: calibration batches, the same samples at every look: one that does not shuffle.
        tolerance: of Q.
        k, samples: see `modularity_curve`.
    """

    def __init__(self, loader: Iterable[Any], tolerance: float = 0.02, k: int = 3, samples: int = 500) -> None:
        self.loader, self.tolerance, self.k, self.samples = loader, tolerance, k, samples
        self.last: ModularityCurve | None = None

    def __call__(self, count: int, model: nn.Module) -> bool:
        """Look; False the first time, and after surgery."""
        before, self.last = self.last, modularity_curve(model, self.loader, self.k, self.samples, repeats=1)
        if before is None or before.layers != self.last.layers:
            return False
        return float(np.abs(self.last.mean - before.mean).max()) <= self.tolerance


def cut_again(model: nn.Module, state: Any) -> None:
    """Remove from a model what was gone by a state of `GradualPruning.state_dict`, and it still has.

    Raises:
        ValueError: for what is no such state, a model that it does not fit, and one that has lost more since; the model
            is as it was.
    """
    try:
        then = PruningPlan.from_json(state["gone"])
        gone = list(zip(then.remove, then.kinds, then.outputs, strict=True))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"state={state!r:.60}: what GradualPruning.state_dict gave is needed") from None
    now = removed_blocks(model).remove
    if since := sorted(set(now) - set(then.remove)):
        raise ValueError(f"the model has lost {', '.join(since)} since that state: give it as it was first, whole")
    if left := [block for block in gone if block[0] not in now]:
        names, kinds, outputs = zip(*left, strict=True)
        PruningPlan(names, kinds, outputs).apply(model)


class GradualPruning:
    """Meets a budget in stages, between which a loop of your own trains. Call it after every epoch, or every step.

    Of MACs, parameters or blocks; `latency` and `width` are for `ModularityPruner`. The fractions are of the model as
    it is when this is first made. After each stage, what holds on to the old parameters other than the optimizers is
    due anew, see `ModularityPruner.step`. To go on in another process, keep `state_dict()` in the checkpoint and give
    it as `state`, before the weights come back and the optimizer is made. One with groups by layer is made before, and
    `state` given inside `carry_over`, which keeps groups that are empty now. What a callable `at` remembers is its own:
    `Settled` has to look twice again.

    Args:
        model: a bare module.
        loader, criterion: see `ModularityPruner`.
        at: the counts of epochs or steps from which on a stage is due, or a callable `(count, model) -> bool` that says
            so, such as `Settled(loader)`. One stage a call.
        shares: of the budget, what is gone after each stage; `cubic` over the counts in `at`, or all at once, if empty.
        flops, params, blocks, ignored_layers: see `ModularityPruner`.
        example_inputs: one sample of the first batch if None.
        state: of `state_dict()`, to go on after its last stage. The blocks that were gone are removed from the model,
            if they are still there.

    Raises:
        ValueError: for counts that do not rise, shares that do not rise to 1, or not one for each count; a state that
            is none, of another budget, or of a model that has lost more since; else as `ModularityPruner`, also for a
            budget that no set of blocks can meet. The model is as it was.

    >>> import torch
    >>> from modprune.models import resnet20
    >>> model, batches = resnet20(), [(torch.randn(40, 3, 8, 8), torch.arange(40) % 4)]
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    >>> prune = GradualPruning(model, batches, "l1_norm", at=(1, 3), blocks=8)
    >>> [plan and len(plan.remove) for plan in (prune(epoch, optimizer) for epoch in (1, 2, 3))]
    [7, None, 1]
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        criterion: str | Criterion = "modularity",
        *,
        at: Sequence[int] | Callable[[int, nn.Module], bool],
        shares: Sequence[float] = (),
        flops: float | None = None,
        params: float | None = None,
        blocks: int | None = None,
        ignored_layers: Sequence[nn.Module | str] = (),
        example_inputs: Any = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_bare(model)
        if not callable(at):
            counts = tuple(at) if isinstance(at, Iterable) else ()
            if not counts or not all(map(is_whole, counts)) or not _rise((0, *counts)):
                raise ValueError(f"at={at}: whole counts from 1 on that rise are needed, as in (10, 20)")
            at = counts
        self.model, self.loader, self.at = model, loader, at
        try:
            self.shares = tuple(map(float, shares)) or cubic(1 if callable(at) else len(at))
            if not _rise((0, *self.shares)) or self.shares[-1] != 1:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"shares={shares}: they rise from above 0 to 1, as in (0.5, 0.75, 1)") from None
        if not callable(at) and len(at) != len(self.shares):
            raise ValueError(f"{len(at)} counts in at and {len(self.shares)} shares: give one share for each")
        with undisturbed(loader):
            self.example = first_sample(loader) if example_inputs is None else example_inputs
        self.budget = Budget(flops, params, blocks)
        self.options = {"criterion": resolve(criterion), "ignored_layers": ignored_layers}
        self.plans: list[PruningPlan] = []
        self.whole = self.now = self._sizes()
        self.count = self.stage = 0
        if state is None:  # better told now than at the first stage: whether the budget can be met at all
            anything = {**self.options, "criterion": Random()}
            ModularityPruner(model, self.example, self.loader, **anything, **asdict(self.budget)).plan()  # type: ignore[arg-type]
        else:
            self._go_on(state)

    def __call__(self, count: int, *optimizers: Optimizer) -> PruningPlan | None:
        """Remove the blocks of the next stage if it is due after `count` epochs or steps.

        Args:
            count: of epochs or steps so far, from 1.
            optimizers: over the model's parameters; they go on with those that stay, see `carry_over`.

        Returns:
            The plan of the stage; None if nothing was removed.
        """
        self.count = count
        self._pass_over()
        if self.stage == len(self.shares) or not self._is_due(count):
            return None
        pruner = ModularityPruner(self.model, self.example, self.loader, **self.options, **self._left(1))  # type: ignore[arg-type]
        pruner.part = Budget(**self._left(self.shares[self.stage]))  # type: ignore[arg-type]
        plan = pruner.plan()
        with carry_over(self.model, *optimizers):
            pruner.step()
            self.plans.append(plan)  # here: an optimizer that cannot go on does not undo the stage
            self.now = self._sizes()
            self.stage += 1
        return plan

    def warn_if_unfinished(self) -> None:
        """To be called at the end of a training: warns if stages never came due."""
        self._pass_over()
        if self.stage < len(self.shares):
            warnings.warn(
                f"{self.stage} of {len(self.shares)} stages of pruning came due before the training ended "
                f"(at={self.at}), {sum(len(plan.remove) for plan in self.plans)} blocks went",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, for `state`; of JSON's types alone."""
        state = {
            "budget": {name: value for name, value in asdict(self.budget).items() if value is not None},
            "shares": self.shares,
            "count": self.count,
            "stage": self.stage,
            "plans": [plan.to_json() for plan in self.plans],
            "whole": self.whole,
            "gone": removed_blocks(self.model).to_json(),
        }
        return json.loads(to_json(state))

    def _go_on(self, state: Mapping[str, Any]) -> None:
        mine = self.state_dict()
        try:
            other = [name for name in ("budget", "shares") if state[name] != mine[name]]
            plans = [PruningPlan.from_json(plan) for plan in state["plans"]]
            whole = {name: int(state["whole"][name]) for name in self.whole}
            count, stage = int(state["count"]), int(state["stage"])
            if not 0 <= stage <= len(self.shares) or min(whole.values()) < 1:
                raise ValueError
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"state={state!r:.60}: what state_dict gave is needed") from None
        if other:
            there, here = state[other[0]], mine[other[0]]
            raise ValueError(f"state: of {other[0]}={there}, where this is {here}: go on as it began")
        cut_again(self.model, state)
        self.plans, self.whole, self.count, self.stage, self.now = plans, whole, count, stage, self._sizes()

    def _pass_over(self) -> None:
        """Stages that are met by what has gone before."""
        while self.stage < len(self.shares) and not self._left(self.shares[self.stage]):
            self.stage += 1

    def _is_due(self, count: int) -> bool:
        return self.at(count, self.model) if callable(self.at) else count >= self.at[self.stage]

    def _sizes(self) -> dict[str, int]:
        return {"flops": max(count_macs(self.model, self.example), 1), "params": count_params(self.model)}

    def _left(self, share: float) -> dict[str, float]:
        """What of `share` of the budget is still to go, as fractions of what is left of the model; empty if nothing."""
        freed = {name: 1 - size / self.whole[name] for name, size in self.now.items()}
        left = self.budget.left(share, freed, sum(len(plan.remove) for plan in self.plans))
        scale = {name: self.whole[name] / size for name, size in self.now.items()}
        return {name: value * scale[name] if name in scale else value for name, value in left.items()}


def _rise(values: Iterable[Any]) -> bool:
    return all(before < after for before, after in pairwise(values))
