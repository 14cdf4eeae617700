"""Two gloo processes: one curve, one plan, and no silent drift after surgery. One pair of processes runs all cases."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modprune import ModularityPruner, PruningPlan, find_blocks, finetune, modularity_curve
from modprune._processes import check_alike, from_first
from modprune.criteria import BlockScores, Dbp, Modularity, ModularityPooled
from modprune.data import ImageLoader, digits
from modprune.models import resnet20

X = torch.zeros(1, 3, 8, 8)
POOLED = ModularityPooled(samples=101, repeats=1), Dbp(samples=101, repeats=1)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet20()


def shard(rank: int) -> list:
    """Every second batch of the digits, as a DistributedSampler would have it."""
    return [(x, y) for x, y, _ in ImageLoader(digits(True), 50)][rank::2]


def by_rank(model, blocks, loader) -> BlockScores:
    """What one block loses less in the first process, another one in the second."""
    return BlockScores(blocks.names, np.roll(np.arange(len(blocks), dtype=float), dist.get_rank())[None])


def sharded_curve(rank: int) -> list:
    return modularity_curve(network(), shard(rank), samples=101, repeats=2).q.tolist()


def sharded_curve_of_little_memory(rank: int) -> list:
    return modularity_curve(network(), shard(rank), samples=101, repeats=1, budget=2**20).q.tolist()


def sharded_pools(rank: int) -> list:
    model = network()
    return [criterion(model, find_blocks(model, X), shard(rank)).values.tolist() for criterion in POOLED]


def common_curve(rank: int) -> list:
    model, seen = network(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    q = modularity_curve(model, ImageLoader(digits(True), 50), samples=100, repeats=2, example_inputs=X).q
    return [q.tolist(), sum(n for n in seen if n > 2)]


def averaged_plan(rank: int) -> str:
    return ModularityPruner(network(), X, [], by_rank, blocks=3).plan().to_json()


def other_statistics(rank: int) -> list:
    """Batch norm of each process has seen images of its own; the plan is made with those of the first."""
    model = network()
    model.bn1.running_mean += 5 * rank
    loader = ImageLoader(digits(True), 50)
    scores = ModularityPruner(model, X, loader, Modularity(samples=100), blocks=3).plan().scores
    return [list(scores.values()), float(model.bn1.running_mean.sum())]


def expanded(rank: int) -> list:
    """What lies behind a value that stands for two is somebody else's."""
    memory = torch.full((3,), float(rank))
    both = memory[:1].expand(2)
    from_first([both, torch.full((), rank), torch.zeros(0, 2)])
    return [both.tolist(), memory.tolist()]


def other_weights(rank: int) -> None:
    ModularityPruner(network(seed=rank), X, [], by_rank, blocks=3).plan()


def other_budget(rank: int) -> None:
    ModularityPruner(network(), X, [], by_rank, blocks=3 + rank).plan()


def wrapped_model(rank: int) -> dict:
    """Prune inside a DDP, try the old one, train two steps in a new one on data of the process's own."""
    wrapper = DistributedDataParallel(network())
    wrapper.module.bn1.running_mean += rank
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruned = ModularityPruner(wrapper, X, [], by_rank, blocks=3).step()
    told = [str(w.message) for w in caught if "were removed" in str(w.message)]
    mean = float(pruned.bn1.running_mean.mean())
    try:
        wrapper(X)
    except RuntimeError as error:
        told.append(str(error))
    fresh = DistributedDataParallel(pruned)
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    for x, y in shard(rank)[:2]:
        optimizer.zero_grad()
        F.cross_entropy(fresh(x), y).backward()
        optimizer.step()
    weights = [p.double().sum().item() for p in pruned.parameters()]
    return {"told": told, "bare": pruned is wrapper.module, "mean": mean, "weights": weights}


def sharded_model(rank: int) -> list:
    """FSDP is refused as long as the model is sharded, and takes what is left of it afterwards."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh, told = dist.init_device_mesh("cpu", (2,)), []
    for shard_it in (lambda m: fully_shard(m, mesh=mesh), lambda m: FullyShardedDataParallel(m, device_id="cpu")):
        try:
            find_blocks(shard_it(network()), X)
        except ValueError as error:
            told.append(str(error))
    pruned = PruningPlan(("layer1.0", "layer3.1")).apply(network())
    if not hasattr(torch.cpu.Stream, "record_event"):
        return [told, 0.0]  # torch 2.6's fully_shard does not run on the CPU
    fully_shard(pruned, mesh=mesh)
    images, labels = shard(rank)[0]
    loss = F.cross_entropy(pruned(images), labels)
    loss.backward()
    return [told, loss.item()]


def unseen_by_accelerate(rank: int) -> None:
    finetune(network(), ImageLoader(digits(True), 64, shuffle=True), epochs=1)


CASES = (
    *(
        unseen_by_accelerate,
        sharded_curve,
        sharded_curve_of_little_memory,
        sharded_pools,
        common_curve,
        averaged_plan,
        other_statistics,
        expanded,
        other_weights,
        other_budget,
    ),
    *(wrapped_model, sharded_model),
)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case in CASES:
        try:
            found = case(rank)
        except RuntimeError as error:
            found = f"RuntimeError: {error}"
        (folder / f"{case.__name__}{rank}.json").write_text(json.dumps(found))
    dist.barrier()  # gloo aborts a process that takes its group down while the other still reads from it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(_rank, (folder,), nprocs=2, start_method="fork")
    return lambda case: [json.loads((folder / f"{case.__name__}{rank}.json").read_text()) for rank in range(2)]


def test_the_curve_is_that_of_one_process_on_the_same_samples(of_both):
    (x0, y0), (x1, y1) = ((torch.cat(t) for t in zip(*shard(rank), strict=True)) for rank in range(2))
    for case, repeats in ((sharded_curve, 2), (sharded_curve_of_little_memory, 1)):
        zero, one = of_both(case)
        assert zero == one
        for repeat in range(repeats):  # 51 samples of the first process, 50 of the second
            a, b = slice(51 * repeat, 51 * repeat + 51), slice(50 * repeat, 50 * repeat + 50)
            both = [(torch.cat([x0[a], x1[b]]), torch.cat([y0[a], y1[b]]))]
            expected = modularity_curve(network(), both, samples=101, repeats=1).q[0]
            assert np.allclose(zero[repeat], expected, atol=1e-6)


def test_criteria_of_pooled_features_see_those_of_all_processes(of_both):
    shards = ((torch.cat(t) for t in zip(*shard(rank), strict=True)) for rank in range(2))
    both = [(x[:n], y[:n]) for (x, y), n in zip(shards, (51, 50), strict=True)]
    model = network()
    expected = [criterion(model, find_blocks(model, X), both).values for criterion in POOLED]
    zero, one = of_both(sharded_pools)
    assert zero == one
    np.testing.assert_allclose(zero, expected, rtol=0, atol=1e-6)


def test_a_loader_that_all_share_is_worked_off_in_parts(of_both):
    expected = modularity_curve(network(), ImageLoader(digits(True), 50), samples=100, repeats=2).q
    for q, forwarded in of_both(common_curve):
        assert np.allclose(q, expected, atol=1e-6)
        assert forwarded == 100  # of 2 x 100


def test_scores_of_all_processes_count(of_both):
    zero, one = of_both(averaged_plan)
    assert zero == one
    scores = list(json.loads(zero)["scores"].values())
    assert scores == [4.0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


def test_a_plan_is_made_with_the_statistics_of_the_first(of_both):
    alone = Modularity(samples=100)(network(), find_blocks(network(), X), ImageLoader(digits(True), 50)).mean
    for scores, moved in of_both(other_statistics):
        assert np.allclose(scores, list(alone.values()), atol=1e-6)
        assert moved == 0


def test_an_expanded_tensor_is_given_where_it_is_and_nowhere_else(of_both):
    assert of_both(expanded) == [[[0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0, 1.0]]]


def test_processes_that_differ_are_named(of_both):
    for case, message in (
        (
            other_weights,
            "RuntimeError: the model of rank 1 is not that of rank 0: load the same weights in every",
        ),
        (
            other_budget,
            "RuntimeError: the plan of rank 1 is not that of rank 0: give every process the same budget",
        ),
    ):
        assert all(found.startswith(message) for found in of_both(case))
    with pytest.raises(RuntimeError, match="the plan of rank 1, 3 is not that of rank 0: mend it"):
        check_alike([1, 2, 1, 0], "the plan", "mend it")


def test_processes_that_would_train_alone_are_refused(of_both):
    for found in of_both(unseen_by_accelerate):
        assert found.startswith("RuntimeError: torch.distributed has 2 processes and accelerate sees 1: start with tor")


def test_a_wrapper_is_refused_after_surgery_and_a_new_one_keeps_the_processes_in_step(of_both):
    zero, one = of_both(wrapped_model)
    for found in (zero, one):
        assert "wrap the pruned model in a new DistributedDataParallel, and make a new optimizer" in found["told"][0]
        assert found["told"][1].startswith("this DistributedDataParallel was made before blocks were removed")
        assert found["bare"]
    assert zero["mean"] == one["mean"]
    assert zero["weights"] == one["weights"]


def test_sharded_models_are_refused_and_pruned_ones_can_be_sharded(of_both):
    for told, loss in of_both(sharded_model):
        assert len(told) == 2
        assert all("sharded over devices (FSDP): remove blocks before" in text for text in told)
        assert np.isfinite(loss)
