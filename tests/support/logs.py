"""A log without a model."""

from hf_dpzo.trajectory.records import Record


# Of a run that changes no model: what the format asks for, and no more.
HEADER = {
    "base": {"architecture": "LlamaForCausalLM", "name": "", "revision": None, "head": {}, "frozen": "0" * 64},
    "adapter": None,
    "trained": {"shapes": "1" * 64, "initial": "2" * 64},
    "method": {"name": "aggzo", "smoothing": 1e-3, "difference": "central", "num_directions": 2},
    "num_directions": 2,
    "update": {"name": "sgd"},
    "directions": {"name": "rademacher", "seed": 0},
    "groups": [{"weight_decay": 0.0, "parameters": ["model.embed_tokens.weight"]}],
    "plan": {"steps": 6, "delta": 1e-5, "query": {"name": "NonPrivateQuery"}},
    "rows": {
        "rows": 10,
        "units": 10,
        "expected_batch_size": 4,
        "privacy_unit_column": None,
        "max_rows_per_unit": None,
        "padded_lengths": None,
        "evaluated_alone": False,
    },
    "replays_on": "any kind of device",
    "made_with": {"isolation": {"status": "not measured", "bound_in_clip_norms": None}, "versions": {}},
}


def record(step: int, **changes) -> Record:
    values = {
        "integers": (step, -(2**62)),
        "learning_rates": (0.1 * step,),
        "smoothing": 1e-3,
        "mask_fingerprint": 2**64 - 1,
    }
    return Record(step=step, **{**values, **changes})
