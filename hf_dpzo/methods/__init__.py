"""The published methods, one in each file: a frozen dataclass of parameters that says which parts a step uses.

README.md beside this file lists the papers, and says where each method differs from its paper.
"""

from hf_dpzo.methods.aggzo import AggZO, scaled_clip_norm
from hf_dpzo.methods.dpzero import DPZero
from hf_dpzo.methods.dpzo import DPZO
from hf_dpzo.methods.method import Method, Paper, PrivateMethod, Stage
from hf_dpzo.methods.mezo import MeZO
from hf_dpzo.methods.projected import Projected
from hf_dpzo.methods.zopo import ZOPO
from hf_dpzo.methods.zoso import ZOSO


METHODS: dict[str, type[Method]] = {
    "mezo": MeZO,
    "dpzero": DPZero,
    "dpzo": DPZO,
    "aggzo": AggZO,
    "zoso": ZOSO,
    "zopo": ZOPO,
    "projected": Projected,
}

__all__ = [
    "DPZO",
    "METHODS",
    "ZOPO",
    "ZOSO",
    "AggZO",
    "DPZero",
    "MeZO",
    "Method",
    "Paper",
    "PrivateMethod",
    "Projected",
    "Stage",
    "scaled_clip_norm",
]
