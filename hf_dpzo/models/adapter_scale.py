"""The factor of an adapter's update in a layer. Its files do not hold it: who loads them has it from rank and alpha."""

import math

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer


def refuse_scaled_layer(layer: torch.nn.Module, model: PeftModel, name: str) -> None:
    """Raise `ValueError` if in a `layer` of `model` the adapter `name` has another factor than it is loaded with."""
    expected = _find_factor(layer, model, name)
    if expected is None or math.isclose(layer.scaling[name], expected, rel_tol=1e-9):
        return
    place = next(place for place, module in model.named_modules() if module is layer)
    raise ValueError(
        f"adapter={name}: in {place} its scale is {layer.scaling[name]:g}, and {expected:g} when it is loaded again, "
        "which follows from its rank and alpha; leave the scale as PEFT sets it, and choose lora_alpha instead."
    )


def _find_factor(layer: torch.nn.Module, model: PeftModel, name: str) -> float | None:
    """Return the factor by which a loaded adapter is multiplied; `None` for kinds that PEFT lets nobody scale."""
    if isinstance(layer, AdaLoraLayer) and name in layer.scaling:  # It divides by its rank, which changes, later.
        return layer.lora_alpha[name] if layer.lora_alpha[name] > 0 else float(layer.r[name])
    if isinstance(layer, LoraLayer) and name in layer.scaling:
        rank = layer.r[name]
        return layer.lora_alpha[name] / (math.sqrt(rank) if model.peft_config[name].use_rslora else rank)
    if isinstance(layer, LycorisLayer) and name in layer.scaling:
        return layer.alpha[name] / layer.r[name]
    return None
