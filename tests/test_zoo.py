"""The quick part of the zoo: counts by hand, everything removed, and the rest still works."""

from __future__ import annotations

import pytest

from benchmarks.zoo import EXPORTS, LATER, SURGERY, ZOO, check

# Counts of torchvision's networks are in test_blocks.
QUICK = (
    *("resnet20", "torchvision:resnet18", "timm:skresnet18", "timm:ghostnet_100", "timm:regnety_004"),
    *("timm:levit_128", "timm:xcit_nano_12_p16_224"),
    *(entry.name for entry in ZOO if entry.name.startswith("transformers:")),
)
# What is not "ok", and why.
REASONS = {
    # Its layers hold their weights transposed, which torch-pruning does not know.
    ("transformers:gpt2", "width"): "no channels inside its blocks",
}


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", QUICK)
def test_a_network_of_the_zoo(name):
    entry = next(entry for entry in ZOO if entry.name == name)
    row = check(entry, fast=name not in ("resnet20", "transformers:swin"))
    assert row["found"] == list(entry.expected)
    steps = [*SURGERY, *LATER, *EXPORTS]
    failed = {step: row[step] for step in steps if row.get(step, "ok") != "ok"}
    assert all(REASONS.get((name, step), "none") in verdict for step, verdict in failed.items()), failed
