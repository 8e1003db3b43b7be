"""A frozen model inside another one, out of sight of what walks through modules.

It is neither trained nor saved with the other one, and a step that does not call it should not look at its thousands
of parts.
"""

import torch


class SetAside:
    """Holds a frozen model, in evaluation mode, so that the module that holds this does not list it.

    Args:
        model: the model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()


def find_set_aside(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the model that `module` has set aside; `None` if there is none.

    >>> module, frozen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    >>> module.held = SetAside(frozen)
    >>> find_set_aside(module) is frozen, find_set_aside(frozen), len(list(module.modules()))
    (True, None, 1)
    """
    held = (value for value in vars(module).values() if isinstance(value, SetAside))
    return next((value.model for value in held), None)
