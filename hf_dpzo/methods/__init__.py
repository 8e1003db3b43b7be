"""The published methods, one file each: a frozen dataclass of parameters that says which parts it uses."""

from hf_dpzo.methods.aggzo import AggZO
from hf_dpzo.methods.dpzero import DPZero
from hf_dpzo.methods.method import Method, Paper
from hf_dpzo.methods.mezo import MeZO


METHODS: dict[str, type[Method]] = {"mezo": MeZO, "dpzero": DPZero, "aggzo": AggZO}

__all__ = ["METHODS", "AggZO", "DPZero", "MeZO", "Method", "Paper"]
