"""Every network of the zoo: blocks found against a count by hand, all of them removed, and what still works then.

    python -m benchmarks.zoo [--fast | --times] [NAME ...]

Random weights; needs the extra `zoo` (timm, transformers, onnx, onnxscript, onnxruntime). `--fast` leaves
torch.compile, torch.export and ONNX out.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks._env import RESULTS, environment, write_result
from modprune import ModularityPruner, find_blocks, load, save
from modprune._depgraph import dependency_graph
from modprune._inputs import call
from modprune.blocks import Blocks
from modprune.cost import count_macs, count_params
from modprune.criteria import Modularity
from modprune.specs import build_model
from modprune.surgery import remove_blocks
from modprune.width import choose_cuts, narrow

NONE = (0, 0, 0)


@dataclass(frozen=True)
class Entry:
    """A network, the size of its images, and how many (identity, transition, plain) blocks it has by its paper."""

    name: str
    expected: tuple[int, int, int]
    size: int = 64
    detection: bool = False

    def build(self) -> tuple[nn.Module, Any]:
        """The network in eval mode with random weights, and example inputs for it."""
        torch.manual_seed(0)
        library, _, name = self.name.partition(":")
        if library == "transformers":
            from benchmarks.zoo_networks import NETWORKS

            make, inputs = NETWORKS[name]
            return make().eval(), inputs
        images = torch.randn(2, 3, self.size, self.size)
        return build_model(self.name).eval(), ([images[0]],) if self.detection else images


# Counted by hand from the papers and configs named beside them, not from our output.
ZOO = [
    # He et al. 2016, table 1: a transition where a stage changes the shape; basic blocks keep it in the first stage.
    Entry("resnet20", (7, 2, 0), 32),
    Entry("resnet56", (25, 2, 0), 32),
    Entry("torchvision:resnet18", (5, 3, 0)),
    Entry("torchvision:resnet34", (13, 3, 0)),
    Entry("torchvision:resnet50", (12, 4, 0)),
    Entry("torchvision:resnet101", (29, 4, 0)),
    Entry("torchvision:resnet152", (46, 4, 0)),
    Entry("torchvision:resnext50_32x4d", (12, 4, 0)),  # Xie et al. 2017, table 1
    Entry("torchvision:wide_resnet50_2", (12, 4, 0)),  # Zagoruyko and Komodakis 2016
    Entry("torchvision:regnet_x_400mf", (18, 4, 0)),  # Radosavovic et al. 2020: depths 1, 2, 7, 12
    Entry("torchvision:regnet_y_400mf", (12, 4, 0)),  # depths 1, 3, 6, 6
    Entry("torchvision:mobilenet_v2", (10, 0, 0)),  # Sandler et al. 2018, table 2: repeats with stride 1
    Entry("torchvision:mobilenet_v3_large", (10, 0, 0)),  # Howard et al. 2019, table 1
    Entry("torchvision:mobilenet_v3_small", (6, 0, 0)),  # table 2
    Entry("torchvision:mnasnet1_0", (10, 0, 0)),  # Tan et al. 2019, figure 7
    Entry("torchvision:efficientnet_b0", (9, 0, 0)),  # Tan and Le 2019, table 1
    Entry("torchvision:efficientnet_v2_s", (35, 0, 0)),  # Tan and Le 2021, table 4: 2 + 3 + 3 + 5 + 8 + 14
    Entry("torchvision:convnext_tiny", (18, 0, 0)),  # Liu et al. 2022: 3 + 3 + 9 + 3
    Entry("torchvision:vit_b_16", (12, 0, 0), 224),  # Dosovitskiy et al. 2021, table 1
    Entry("torchvision:swin_t", (12, 0, 0)),  # Liu et al. 2021: 2 + 2 + 6 + 2
    Entry("torchvision:swin_v2_t", (12, 0, 0)),
    # Tu et al. 2022, table 1: 2 + 2 + 5 + 2 layers of an MBConv (the first of a stage strided) and two attentions.
    Entry("torchvision:maxvit_t", (29, 4, 0), 224),
    Entry("torchvision:fcn_resnet50", (12, 4, 0)),
    Entry("torchvision:deeplabv3_resnet50", (12, 4, 0)),
    Entry("torchvision:lraspp_mobilenet_v3_large", (10, 0, 0)),
    Entry("torchvision:fasterrcnn_resnet50_fpn", (12, 4, 0), detection=True),
    Entry("torchvision:vgg11_bn", (0, 0, 4)),  # Simonyan and Zisserman 2015, table 1: 3x3 convolutions of equal width
    Entry("torchvision:vgg16_bn", (0, 0, 9)),
    # Szegedy et al. 2016, figures 5 to 7: 3x3, 1x7 and 7x1 of equal width; 3 + 4 + 8 + 6 + 2 + 8.
    Entry("torchvision:inception_v3", (0, 0, 31), 299),
    Entry("torchvision:densenet121", NONE),  # concatenates
    Entry("torchvision:googlenet", NONE),  # no convolution keeps its width
    Entry("torchvision:alexnet", NONE),  # no norm
    Entry("torchvision:squeezenet1_0", NONE),  # concatenates
    Entry("torchvision:shufflenet_v2_x1_0", NONE),  # splits and concatenates
    Entry("timm:resnet50", (12, 4, 0)),
    Entry("timm:resnetv2_50", (12, 4, 0)),  # He et al. 2016, identity mappings
    Entry("timm:seresnet50", (12, 4, 0)),  # Hu et al. 2018
    Entry("timm:res2net50_26w_4s", (12, 4, 0)),  # Gao et al. 2019
    Entry("timm:resnest26d", (4, 4, 0)),  # Zhang et al. 2020: 2 + 2 + 2 + 2
    Entry("timm:skresnet18", (5, 3, 0)),  # Li et al. 2019, on ResNet18
    Entry("timm:dm_nfnet_f0", (8, 4, 0)),  # Brock et al. 2021: 1 + 2 + 6 + 3
    Entry("timm:darknet53", (23, 0, 0)),  # Redmon and Farhadi 2018: 1 + 2 + 8 + 8 + 4
    Entry("timm:inception_resnet_v2", (40, 0, 0), 96),  # Szegedy et al. 2017: 10 + 20 + 10, scaled branches
    Entry("timm:ghostnet_100", (11, 5, 0)),  # Han et al. 2020, table 1
    Entry("timm:efficientnet_b0", (9, 0, 0)),
    Entry("timm:mobilenetv3_large_100", (10, 0, 0)),
    Entry("timm:regnety_004", (12, 4, 0)),
    Entry("timm:convnext_tiny", (18, 0, 0)),
    Entry("timm:inception_next_tiny", (18, 0, 0)),  # Yu et al. 2024: 3 + 3 + 9 + 3
    Entry("timm:vit_tiny_patch16_224", (12, 0, 0), 224),
    Entry("timm:deit_tiny_patch16_224", (12, 0, 0), 224),  # Touvron et al. 2021
    Entry("timm:beit_base_patch16_224", (12, 0, 0), 224),  # Bao et al. 2022
    Entry("timm:eva02_tiny_patch14_224", (12, 0, 0), 224),  # Fang et al. 2023
    Entry("timm:cait_xxs24_224", (24, 0, 0), 224),  # Touvron et al. 2021: 24; the class attention is fed by the patches
    Entry("timm:swin_tiny_patch4_window7_224", (12, 0, 0), 224),
    Entry("timm:mixer_s16_224", (8, 0, 0), 224),  # Tolstikhin et al. 2021, table 1
    Entry("timm:resmlp_12_224", (12, 0, 0), 224),  # Touvron et al. 2021
    Entry("timm:gmlp_s16_224", (30, 0, 0), 224),  # Liu et al. 2021
    Entry("timm:convmixer_768_32", (32, 0, 0)),  # Trockman and Kolter 2022
    Entry("timm:poolformer_s12", (12, 0, 0)),  # Yu et al. 2022: 2 + 2 + 6 + 2
    Entry("timm:focalnet_tiny_srf", (12, 0, 0)),  # Yang et al. 2022: 2 + 2 + 6 + 2
    Entry("timm:davit_tiny", (12, 0, 0)),  # Ding et al. 2022: (1 + 1 + 3 + 1) x (spatial, channel)
    Entry("timm:pvt_v2_b0", (8, 0, 0)),  # Wang et al. 2022: 2 + 2 + 2 + 2
    Entry("timm:xcit_nano_12_p16_224", (12, 2, 0), 224),  # El-Nouby et al. 2021: 12, and 2 of class attention
    Entry("timm:edgenext_xx_small", (12, 0, 0)),  # Maaz et al. 2022: 2 + 2 + 6 + 2
    Entry("timm:hiera_tiny_224", (9, 3, 0), 224),  # Ryali et al. 2023: 1 + 2 + 7 + 2, three of them pool
    Entry("timm:levit_128", (12, 2, 0), 224),  # Graham et al. 2021: 4 + 4 + 4, and an MLP after each of two shrinkings
    Entry("timm:volo_d1_224", (18, 0, 0), 224),  # Yuan et al. 2021: 4 outlookers, 14 transformers
    Entry("timm:twins_svt_small", (22, 0, 0)),  # Chu et al. 2021: 2 + 2 + 10 + 4, and 4 position encodings x + conv(x)
    Entry("timm:coatnet_0_rw_224", (10, 4, 0), 224),  # Dai et al. 2021: 2 + 3 + 7 + 2, the first of each stage strided
    Entry("timm:mambaout_femto", (18, 0, 0)),  # Yu and Wang 2024: 3 + 3 + 9 + 3
    Entry("transformers:vit", (3, 0, 0)),  # from here on: as many as their config in zoo_networks.py says
    Entry("transformers:deit", (3, 0, 0)),
    Entry("transformers:beit", (3, 0, 0)),
    Entry("transformers:dinov2", (3, 0, 0)),
    Entry("transformers:swin", (4, 0, 0)),
    Entry("transformers:convnext", (5, 0, 0)),
    Entry("transformers:resnet", (4, 1, 0)),
    Entry("transformers:regnet", (3, 2, 0)),
    Entry("transformers:poolformer", (5, 0, 0)),
    Entry("transformers:clip_vision", (3, 0, 0)),
    Entry("transformers:bert", (3, 0, 0)),
    Entry("transformers:roberta", (3, 0, 0)),
    Entry("transformers:distilbert", (3, 0, 0)),
    Entry("transformers:albert", NONE),  # one layer, called for all
    Entry("transformers:gpt2", (3, 0, 0)),
    Entry("transformers:llama", (3, 0, 0)),
    Entry("transformers:qwen2", (3, 0, 0)),
    Entry("transformers:gemma2", (3, 0, 0)),
    Entry("transformers:t5_encoder", (3, 0, 0)),  # MLPs: the first attention's position bias feeds all the others
    Entry("transformers:bart", (3, 0, 0)),  # the encoder: it feeds the decoder's layers
    Entry("transformers:whisper_encoder", (3, 0, 0)),
    Entry("transformers:wav2vec2", (3, 0, 0)),
    Entry("transformers:wav2vec2_stable", (3, 0, 0)),
]


def check(entry: Entry, fast: bool) -> dict[str, Any]:
    """One row of the table but for the seconds: counts, and of each step "ok" or what went wrong."""
    model, inputs = entry.build()
    blocks = find_blocks(model, inputs)
    kinds = Counter(block.kind for block in blocks)
    row: dict[str, Any] = {
        "network": entry.name,
        "expected": list(entry.expected),
        "found": [kinds["identity"], kinds["transition"], kinds["plain"]],
        "refused": blocks.refused,
        "removed": 0,
    }
    if not blocks:
        return row
    pruned = copy.deepcopy(model)
    for name, step in SURGERY.items():
        row[name] = _verdict(lambda step=step: step(model, pruned, blocks, inputs))
    for name, step in {**LATER, **({} if fast else EXPORTS)}.items():
        row[name] = _verdict(lambda step=step: step(pruned, inputs))
        if row[name] != "ok" and (before := _verdict(lambda step=step: step(model, inputs))) != "ok":
            row[name] = f"unpruned too: {before}"
    return row | {"removed": len(blocks), "params_before": count_params(model), "params_after": count_params(pruned)}


ROUNDS, SECONDS = 7, 2.0  # of measuring, at least


def times(model: nn.Module, inputs: Any) -> dict[str, float | None]:
    """Least seconds, in turns, of a forward pass, of building torch-pruning's dependency graph, of finding.

    None where torch-pruning cannot.
    """
    runs: dict[str, Callable[[], Any]] = {
        "forward_seconds": lambda: _outputs(model, inputs),
        "depgraph_seconds": lambda: dependency_graph(model, inputs),
        "find_seconds": lambda: find_blocks(model, inputs),
    }
    taken, started = [], time.perf_counter()
    while len(taken) <= ROUNDS or time.perf_counter() - started < SECONDS:  # the first round warms up
        taken.append({name: _seconds(run) for name, run in runs.items()})
    return {name: None if taken[0][name] is None else min(r[name] for r in taken[1:]) for name in runs}  # type: ignore


def _verdict(step: Callable[[], None]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.150}"
    return "ok"


def _surgery(model: nn.Module, pruned: nn.Module, blocks: Blocks, inputs: Any) -> None:
    remove_blocks(pruned, blocks.names, example_inputs=inputs)
    freed = sum(block.params for block in blocks)
    if count_params(model) - count_params(pruned) != freed:
        raise AssertionError(f"{count_params(model) - count_params(pruned)} parameters went, the blocks hold {freed}")
    freed = sum(block.macs for block in blocks)
    went = count_macs(model, inputs) - count_macs(pruned, inputs)
    if went != freed and not isinstance(inputs, tuple):  # a detector of random weights finds another number of objects
        raise AssertionError(f"{went} MACs went, the blocks hold {freed}")


def _same_shapes(model: nn.Module, pruned: nn.Module, blocks: Blocks, inputs: Any) -> None:
    before, after = ([t.shape for t in _outputs(m, inputs)] for m in (model, pruned))
    # A detector of random weights finds another number of objects.
    if before != after and not isinstance(inputs, tuple):
        raise AssertionError(f"shapes {before} became {after}")


def _gradients(pruned: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, tuple):
        inputs = inputs[0][0][None]
        pruned = pruned.backbone  # type: ignore[assignment]
    pruned.zero_grad()
    outputs = [leaf for leaf in tree_leaves(call(pruned, inputs)) if isinstance(leaf, torch.Tensor) and leaf.grad_fn]
    sum(t.float().square().mean() for t in outputs).backward()  # type: ignore[union-attr]
    reached = [p for p in pruned.parameters() if p.grad is not None]
    if not reached or not all(p.grad.isfinite().all() for p in reached):  # type: ignore[union-attr]
        raise AssertionError("no finite gradient arrives")
    pruned.zero_grad()


def _round_trip(model: nn.Module, pruned: nn.Module, blocks: Blocks, inputs: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.safetensors"
        save(pruned, path)
        loaded = load(path, copy.deepcopy(model))
    expected, got = _outputs(pruned, inputs), _outputs(loaded, inputs)
    if not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
        raise AssertionError("the loaded network computes something else")


def _width(model: nn.Module, pruned: nn.Module, blocks: Blocks, inputs: Any) -> None:
    """Half of the blocks and 0.3 of the channels inside the others go, and come back from a file."""
    narrowed = copy.deepcopy(model)
    gone = blocks[::2]
    remove_blocks(narrowed, [b.name for b in gone], kinds=[b.kind for b in gone], outputs=[b.outputs for b in gone])
    cuts = choose_cuts(narrowed, find_blocks(narrowed, inputs), inputs, 0.3)
    narrow(narrowed, cuts, inputs)
    _same_shapes(model, narrowed, blocks, inputs)
    _round_trip(model, narrowed, blocks, inputs)


def _pruner(model: nn.Module, pruned: nn.Module, blocks: Blocks, inputs: Any) -> None:
    """The block of least gain in modularity over eight samples goes."""
    samples = 1 if isinstance(inputs, tuple) else 2
    labels = (torch.arange(8) % 2).split(samples)
    labelled = [{**inputs, "labels": y} if isinstance(inputs, dict) else (inputs, y) for y in labels]
    shrinking = copy.deepcopy(model)
    ModularityPruner(shrinking, inputs, labelled, Modularity(k=1, samples=8, repeats=1), blocks=1).step()
    _same_shapes(model, shrinking, blocks, inputs)


def _compile(pruned: nn.Module, inputs: Any) -> None:
    torch.compiler.reset()
    _close(_outputs(torch.compile(pruned), inputs), _outputs(pruned, inputs))


def _export(pruned: nn.Module, inputs: Any) -> None:
    args, kwargs = _arguments(inputs)
    exported = torch.export.export(pruned, args, kwargs).module()
    _close(tree_leaves(exported(*args, **kwargs)), _outputs(pruned, inputs))


def _onnx(pruned: nn.Module, inputs: Any) -> None:
    import onnxruntime

    args, kwargs = _arguments(inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        torch.onnx.export(pruned, args, path, kwargs=kwargs, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = [t.numpy() for t in (*args, *kwargs.values())]
        outputs = session.run(None, dict(zip([i.name for i in session.get_inputs()], given, strict=True)))
    _close([torch.from_numpy(o) for o in outputs], _outputs(pruned, inputs))


# What modprune does, each from the whole model, the one without its blocks, these, and inputs.
SURGERY: dict[str, Callable[[nn.Module, nn.Module, Blocks, Any], None]] = {
    "surgery": _surgery,
    "forward": _same_shapes,
    "round_trip": _round_trip,
    "width": _width,
    "pruner": _pruner,
}
# What a pruned network is used for later, quick and slow; what the unpruned one cannot do either, is none of ours.
LATER: dict[str, Callable[[nn.Module, Any], Any]] = {"gradients": _gradients, "depgraph": dependency_graph}
EXPORTS: dict[str, Callable[[nn.Module, Any], None]] = {"compile": _compile, "export": _export, "onnx": _onnx}


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _outputs(model: Any, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, torch.Tensor)]


def _close(got: list[Any], expected: list[torch.Tensor]) -> None:
    """Equal to 1e-4, of the largest value where that is above 1: random weights may give millions."""
    tensors = [leaf for leaf in got if isinstance(leaf, torch.Tensor)]
    for a, b in zip(tensors, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * max(1.0, b.abs().max().item()))


def _seconds(run: Callable[[], Any]) -> float | None:
    """How long it takes, but for collecting garbage, as `timeit` has it; None where it cannot run."""
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except RuntimeError:
        return None
    finally:
        gc.enable()
    return time.perf_counter() - started


def main(names: list[str], fast: bool, only_times: bool) -> None:
    """Check the networks named, or all, write benchmarks/results/zoo.json and keep there what is not checked now."""
    path = RESULTS / "zoo.json"
    known = {row["network"]: row for row in json.loads(path.read_text())["networks"]} if path.exists() else {}
    for entry in ZOO:
        if not names or entry.name in names:
            checked = {} if only_times else check(entry, fast)
            measured = times(*entry.build()) | {"environment": environment()}
            known[entry.name] = known.get(entry.name, {}) | checked | measured
            print(json.dumps(known[entry.name]), flush=True)
            rows = [known[e.name] for e in ZOO if e.name in known]
            write_result("zoo", {"command": "python -m benchmarks.zoo", "networks": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks to check anew; all if none are named")
    parser.add_argument("--fast", action="store_true", help="without torch.compile, torch.export and ONNX")
    parser.add_argument("--times", dest="only_times", action="store_true", help="measure nothing but the seconds anew")
    main(**vars(parser.parse_args()))
