"""`ModularityPruner`: find the blocks, score them, choose, remove."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from modprune._bare import check_bare
from modprune._inputs import first_line
from modprune._processes import check_alike, everyones, from_first, place
from modprune._random import undisturbed
from modprune._state import copied
from modprune.blocks import Block, Blocks, find_blocks, tied_params
from modprune.budget import Budget, Candidate, check_fraction, choose_part
from modprune.cost import count_macs, count_params, latency_by_module, macs_by_module
from modprune.criteria import BlockScores, Criterion, name_of, resolve, scores_by
from modprune.plan import PruningPlan
from modprune.width import choose_cuts, narrow

# MACs, parameters and nanoseconds of the whole model; the last is 0 where time is no budget.
_Totals = tuple[int, int, int]


class ModularityPruner:
    """Removes the residual blocks with the least score, subject to a budget.

    Args:
        model: a bare module, changed by `step` alone; of one in DistributedDataParallel or DataParallel, what it wraps.
        example_inputs: a tensor, a tuple or a dict, as in torch-pruning.
        loader: calibration batches `(inputs, labels, ...)` or dicts with `labels`, from the training set.
        criterion: a name ("modularity", "block_influence", "ablation", ...) or a callable, see `modprune.criteria`.
        flops, params: fractions of MACs and parameters to remove, at least.
        blocks: how many blocks to remove, exactly.
        latency: fraction of the time of a forward pass to remove, at least, in place of `flops`: as measured here and
            now on `example_inputs`, whose batch size counts. Blocks of equal cost are taken to be equally fast.
        width: fraction of the channels to cut afterwards from each layer inside the blocks that stay, by torch-pruning;
            None for none.
        ignored_layers: modules or names that must stay: no block that is one, is inside one or holds one goes.
        iterative_steps: 1 chooses all blocks from one measurement. With n > 1 the budget is met in n equal stages,
            the network measured anew before each: it takes its part of what would go now for all that is left.

    Of several processes (torch.distributed) all make the pruner and call it together, with the same weights. Each
    measures its share of the samples: modularity and the linear classifiers gather the features, so that their scores
    are those of one process; what the other criteria score is averaged (`block_influence` and `cka` take all of
    their samples from the loader of each). All take the buffers of the first before.

    Raises:
        ValueError: for budgets out of range, a model without removable blocks, an unknown criterion or layer.
        RuntimeError: if the processes have not the same model or come to other plans; names their ranks.

    >>> import torch
    >>> from modprune.models import resnet20
    >>> images, labels = torch.randn(600, 3, 8, 8), torch.arange(600) % 10
    >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 100)
    >>> pruner = ModularityPruner(resnet20(), torch.zeros(1, 3, 8, 8), loader, blocks=2)
    >>> len(pruner.plan().remove)
    2
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any],
        criterion: str | Criterion = "modularity",
        *,
        flops: float | None = None,
        params: float | None = None,
        blocks: int | None = None,
        latency: float | None = None,
        width: float | None = None,
        ignored_layers: Sequence[nn.Module | str] = (),
        iterative_steps: int = 1,
    ) -> None:
        if not isinstance(iterative_steps, (int, float, np.number)) or not iterative_steps >= 1 or iterative_steps % 1:
            raise ValueError(f"iterative_steps={iterative_steps!r}: a whole number, at least 1, is needed")
        check_fraction("width", width)
        self.wrapper = model if isinstance(model, (DataParallel, DistributedDataParallel)) else None
        self.model = model = model if self.wrapper is None else self.wrapper.module
        check_bare(model)  # before processes compare what each has of a sharded one
        self.example_inputs, self.loader = example_inputs, loader
        self.criterion, self.budget = resolve(criterion), Budget(flops, params, blocks, latency)
        self.ignored, self.iterative_steps, self.width = _names(model, ignored_layers), int(iterative_steps), width
        self.part: Budget | None = None  # of the budget, what goes now: `GradualPruning` leaves the rest for later
        self.scores: BlockScores | None = None
        self._plan: PruningPlan | None = None

    @torch.inference_mode(False)  # of such tensors, none could be trained
    def plan(self) -> PruningPlan:
        """Measure and choose; the model stays whole. Measured once: the same plan comes again."""
        if self._plan is None:
            if place()[1] > 1:  # one process need not read all of its weights for it
                check_alike(everyones(_fingerprint(self.model)), "the model", "load the same weights in every process")
                from_first(self.model.buffers())  # statistics of batch norm, which each has of its own images
            plan = self._make_plan()
            chosen = everyones((plan.remove, plan.kinds, plan.outputs, plan.width))
            check_alike(chosen, "the plan", "give every process the same budget, criterion and library versions")
            self._plan = plan
        return self._plan

    @torch.inference_mode(False)
    def step(self) -> nn.Module:
        """Remove the planned blocks from the model in place, prove that it runs, and return it, bare.

        What holds on to the old parameters is due anew: DistributedDataParallel or DataParallel around the model, the
        optimizer (or see `carry_over`) and with it the schedule, and an average of the weights. All processes have the
        buffers of the first, as they are then.
        """
        plan = self.plan()
        pruned = plan.apply(self.model, self.example_inputs)
        from_first(pruned.buffers())
        if self.wrapper is not None:
            _retire(self.wrapper)
        return pruned

    def _make_plan(self) -> PruningPlan:
        blocks = find_blocks(self.model, self.example_inputs)
        times = {} if self.budget.latency is None else _nanoseconds(self.model, blocks, self.example_inputs)
        times = everyones(times)[0]  # each process takes its own
        macs = max(count_macs(self.model, self.example_inputs), 1)
        totals = macs, count_params(self.model), times.get("", 0)
        gone = self._choose(blocks, times, totals)
        going = {candidate.name for candidate in gone}
        chosen = [block for block in blocks if block.name in going]
        # What they share, a later stage has counted as one's own.
        params = sum(block.params for block in chosen) + tied_params(self.model, chosen)
        freed = {**_freed(gone, totals), "params": params / totals[1]}
        assert self.scores is not None
        parts = {"criterion": name_of(self.criterion), "scores": self.scores.mean, "freed": freed}
        plan = replace(_plan_for(chosen), **parts)  # type: ignore[arg-type]
        return plan if self.width is None else self._with_width(plan, self.width, totals)

    def _choose(self, blocks: Blocks, times: Mapping[str, int], totals: _Totals) -> list[Candidate]:
        """What goes, stage by stage; `scores` are those of the first measurement."""
        whole = {block.name: block for block in blocks}
        gone: list[Candidate] = []
        model = self.model if self.iterative_steps == 1 else copied(self.model)
        for stage in range(1, self.iterative_steps + 1):
            freed = _freed(gone, totals)
            left = self.budget.left(stage / self.iterative_steps, freed, len(gone))
            if not left and self.scores is not None:
                continue
            if not blocks:
                raise ValueError(f"{type(model).__name__} has no block that can be removed ({blocks.why_no_more})")
            with undisturbed(self.loader):
                scores = _of_all(scores_by(self.criterion, model, blocks, self.loader))
            self.scores = self.scores or scores
            if not left:
                continue
            candidates = _candidates(blocks, scores, self.ignored, times)
            rest, part = Budget(**self.budget.left(1, freed, len(gone))), self.part or Budget(**left)  # type: ignore[arg-type]
            names = choose_part(candidates, rest, part, *totals)
            gone += [candidate for candidate in candidates if candidate.name in names]
            if stage < self.iterative_steps:
                _plan_for([whole[name] for name in names]).apply(model, self.example_inputs)
                # What only looks like a block now that others are gone is none of the whole model's.
                found = find_blocks(model, self.example_inputs)
                blocks = Blocks([block for block in found if block.name in whole], found.refused)
        return gone

    def _with_width(self, plan: PruningPlan, width: float, totals: _Totals) -> PruningPlan:
        """The plan with the channels to cut once its blocks are gone; all on a copy."""
        trial = plan.apply(copied(self.model), self.example_inputs)
        blocks = find_blocks(trial, self.example_inputs)
        ignored = [name for name in self.ignored if name in dict(trial.named_modules())]
        cuts = choose_cuts(trial, blocks, self.example_inputs, width, ignored)
        try:
            narrow(trial, cuts, self.example_inputs)
            left = count_macs(trial, self.example_inputs) / totals[0], count_params(trial) / totals[1]
        except RuntimeError as error:
            problem = f"the model does not run on fewer channels ({first_line(error):.90})"
            raise RuntimeError(f"width={width}: {problem}: give another fraction, ignored_layers, or none") from error
        return replace(plan, width=cuts, freed={**plan.freed, "flops": 1 - left[0], "params": 1 - left[1]})


def _plan_for(gone: Sequence[Block]) -> PruningPlan:
    return PruningPlan(tuple(b.name for b in gone), tuple(b.kind for b in gone), tuple(b.outputs for b in gone))


def _fingerprint(model: nn.Module) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and sum of the bytes of every parameter: other weights lead to other plans, each fine by itself."""
    return [
        (name, tuple(p.shape), int(p.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)))
        for name, p in model.named_parameters()
    ]


def _of_all(scores: BlockScores) -> BlockScores:
    """The repeats of all processes."""
    return replace(scores, values=np.concatenate(everyones(scores.values)))


def _retire(wrapper: nn.Module) -> None:
    """The old wrapper would wait for gradients that no longer come, or let the processes drift apart in silence."""
    kind = type(wrapper).__name__
    due = f"wrap the pruned model in a new {kind}, and make a new optimizer (or carry_over), schedule and EMA"

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"this {kind} was made before blocks were removed: {due}")

    wrapper.register_forward_pre_hook(refuse)
    warnings.warn(f"blocks were removed from a model in {kind}: {due}", stacklevel=3)


def _nanoseconds(model: nn.Module, blocks: Blocks, example_inputs: Any) -> dict[str, int]:
    """The time of the model, under "", and what is saved of it by each block; equal blocks get their mean.

    A block whose shortcut stays saves the share of its time that it saves of its MACs.
    """
    parts = {b.name: {*b.layers, b.end} if b.kind == "plain" else {b.name} for b in blocks}
    seconds = latency_by_module(model, sorted(set().union(*parts.values())), example_inputs)
    macs = macs_by_module(model, example_inputs)
    alike: dict[tuple[Any, ...], list[float]] = {}
    for block in blocks:
        whole = sum(seconds[part] for part in parts[block.name])
        saved = whole * block.macs / max(macs[block.name], 1)
        alike.setdefault((block.kind, block.macs, block.params), []).append(saved)
    mean = {key: sum(values) / len(values) for key, values in alike.items()}
    times = {block.name: mean[block.kind, block.macs, block.params] for block in blocks}
    return {name: round(1e9 * value) for name, value in {"": seconds[""], **times}.items()}


def _freed(gone: Sequence[Candidate], totals: _Totals) -> dict[str, float]:
    freed = {"flops": sum(c.macs for c in gone) / totals[0], "params": sum(c.params for c in gone) / totals[1]}
    return freed | ({"latency": sum(c.nanoseconds for c in gone) / totals[2]} if totals[2] else {})


def _candidates(
    blocks: Blocks, scores: BlockScores, ignored: frozenset[str], times: Mapping[str, int]
) -> list[Candidate]:
    mean = scores.mean
    return [
        Candidate(block.name, mean[block.name], block.macs, block.params, times.get(block.name, 0))
        for block in blocks
        if not any(
            own == name or _inside(own, name) or _inside(name, own)
            for name in ignored
            for own in (block.name, *block.layers, block.end)  # those of a plain unit lie beside it
        )
    ]


def _inside(name: str, outer: str) -> bool:
    return name.startswith(outer + ".")


def _names(model: nn.Module, layers: Sequence[nn.Module | str]) -> frozenset[str]:
    """Every name of every layer: one that several blocks share keeps them all."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        given = type(layers).__name__ if isinstance(layers, nn.Module) else repr(layers)
        raise ValueError(f"ignored_layers={given:.60}: a list of modules or of their names is needed, as ['layer1']")
    known = dict(model.named_modules(remove_duplicate=False))
    names = set()
    for layer in layers:
        module = known.get(layer) if isinstance(layer, str) else layer
        own = {name for name, other in known.items() if name and other is module}
        if not own:
            raise ValueError(f"ignored_layers: {layer!r:.60} is no module of the model: give modules or their names")
        names |= own
    return frozenset(names)
