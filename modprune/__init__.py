"""Remove whole redundant residual blocks from trained networks, chosen by graph modularity."""

from modprune.blocks import Block, Blocks, find_blocks
from modprune.carry import carry_over
from modprune.cost import count_macs, count_params
from modprune.criteria import BlockScores
from modprune.curve import ModularityCurve, modularity_curve
from modprune.distill import CachedTeacher
from modprune.evaluate import Evaluation, evaluate
from modprune.finetune import finetune
from modprune.gradual import GradualPruning, Settled, cubic
from modprune.graph import modularity
from modprune.plan import PruningPlan
from modprune.pruner import ModularityPruner
from modprune.report import Report, compare
from modprune.store import load, save
from modprune.weights import load_weights

__all__ = [
    "Block",
    "BlockScores",
    "Blocks",
    "CachedTeacher",
    "Evaluation",
    "GradualPruning",
    "ModularityCurve",
    "ModularityPruner",
    "PruningPlan",
    "Report",
    "Settled",
    "carry_over",
    "compare",
    "count_macs",
    "count_params",
    "cubic",
    "evaluate",
    "find_blocks",
    "finetune",
    "load",
    "load_weights",
    "modularity",
    "modularity_curve",
    "save",
]
