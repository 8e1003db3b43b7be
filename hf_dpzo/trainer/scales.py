"""The scales of the directions of a run, chosen by the names of what is trained."""

from collections.abc import Mapping

import torch

from hf_dpzo.models.adapters import name_as_published
from hf_dpzo.zo.optimizer import ZOOptimizer


def match_scales(model: torch.nn.Module, optimizer: ZOOptimizer, patterns: Mapping[str, float] | None) -> list[float]:
    """Return the scale of each parameter of `optimizer`, in its order.

    That of the first pattern which the parameter's name holds; one for any other. Names are those of the log.

    Args:
        model: the model that holds the parameters.
        optimizer: the optimizer.
        patterns: the scales by parts of names; `None` for no scale.

    Raises:
        ValueError: no trained parameter's name holds a pattern that no earlier one has taken.
    """
    named = name_as_published(model, dict(model.named_parameters()))
    names = {id(parameter): name for name, parameter in named.items()}
    trained = [names[id(parameter)] for parameter in optimizer.parameters()]
    chosen = [next((part for part in patterns or () if part in name), None) for name in trained]
    for part in patterns or ():
        if part not in chosen:
            raise ValueError(
                f"perturbation_scales: no trained parameter is left whose name holds {part!r}; correct it, or name the "
                f"narrower part first. Trained are {', '.join(trained[:3])}{' and others' if len(trained) > 3 else ''}."
            )
    return [1.0 if part is None else patterns[part] for part in chosen]
