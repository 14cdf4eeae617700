"""The quick part of the zoo: counts by hand, everything removed, and the rest still works."""

from __future__ import annotations

import pytest

from benchmarks.zoo import ZOO, check

# Counts of torchvision's networks are in test_blocks.
QUICK = (
    *("resnet20", "torchvision:resnet18", "timm:skresnet18", "timm:ghostnet_100", "timm:regnety_004"),
    *("timm:levit_128", "timm:xcit_nano_12_p16_224"),
    *(entry.name for entry in ZOO if entry.name.startswith("transformers:")),
)
STEPS = ("surgery", "forward", "gradients", "round_trip", "depgraph", "width", "compile", "export", "onnx")
# torch-pruning divides by zero where a class token is cut off right after it was put in front, and does not know the
# transposed linear layers of GPT-2.
NO_GRAPH = {
    **dict.fromkeys(("transformers:vit", "transformers:dinov2", "transformers:clip_vision"), "depgraph"),
    "transformers:gpt2": "width",
}


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", QUICK)
def test_a_network_of_the_zoo(name):
    entry = next(entry for entry in ZOO if entry.name == name)
    row = check(entry, fast=name not in ("resnet20", "transformers:swin"))
    assert row["found"] == list(entry.expected)
    failed = {step: row[step] for step in STEPS if row.get(step, "ok") != "ok"}
    if name in NO_GRAPH:
        assert "no dependency graph" in failed.pop(NO_GRAPH[name])
    assert not failed
