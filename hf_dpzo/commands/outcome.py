"""What a command is added to, and what it hands back."""

import argparse
from dataclasses import dataclass


# What `add_subparsers` returns, which argparse has no public name for.
Commands = argparse._SubParsersAction


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command says on standard output, and the exit status that it ends with.

    Args:
        text: whole lines.
        status: 0 where all is well, 1 where a claim does not hold, 3 where it could not be checked.
    """

    text: str
    status: int = 0
