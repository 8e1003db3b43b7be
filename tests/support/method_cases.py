"""Each method, as its users would run it."""

from hf_dpzo.methods import METHODS, PrivateMethod


# Each method as its users would run it, and its options that change what is released or moved.
CASES = {
    "mezo": {"method": "mezo", "num_directions": 2},
    "mezo-adam": {"method": "mezo", "update": "adam"},
    "mezo-momentum": {"method": "mezo", "update": "momentum"},
    "dpzero": {"method": "dpzero"},
    "dpzero-paper-noise": {"method": "dpzero", "paper_noise": True},
    "dpzo": {"method": "dpzo"},
    "dpzo-laplace": {"method": "dpzo", "noise": "laplace", "difference": "forward"},
    "aggzo": {"method": "aggzo", "num_directions": 3},
    "aggzo-forward-normalized": {
        "method": "aggzo",
        "num_directions": 3,
        "difference": "forward",
        "update": "normalized",
        "learning_rate": 1e-3,
    },
    "zoso": {"method": "zoso", "num_directions": 2, "num_stages": 2, "anchor_strength": 0.5, "final_smoothing": 1e-3},
    "zopo": {"method": "zopo", "num_stages": 2, "pruning_ratio": 0.3},
    "zopo-dynamic-adam": {
        "method": "zopo",
        "num_stages": 2,
        "pruning_ratio": 0.3,
        "mask": "dynamic",
        "update": "adam",
    },
    "projected": {"method": "projected", "radius": 0.02, "num_directions": 2},
}
PRIVATE = [name for name, case in CASES.items() if issubclass(METHODS[case["method"]], PrivateMethod)]
