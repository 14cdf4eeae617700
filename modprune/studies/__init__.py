"""The experiments of Lu et al. (ECCV 2022) on one's own networks and data, each one function and one picture.

Every study returns a `Study`: numbers, a figure and a paragraph; `study.write(folder)` writes all three.
"""

from modprune.studies.ablation import ablation
from modprune.studies.attacks import attacks
from modprune.studies.curves import curves
from modprune.studies.difference import difference
from modprune.studies.plateaus import plateaus
from modprune.studies.redundancy import redundancy
from modprune.studies.separation import separation
from modprune.studies.study import Parts, Study
from modprune.studies.training import CurveRecorder, training

__all__ = [
    "CurveRecorder",
    "Parts",
    "Study",
    "ablation",
    "attacks",
    "curves",
    "difference",
    "plateaus",
    "redundancy",
    "separation",
    "training",
]
