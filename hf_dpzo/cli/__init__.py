"""The commands of `hf-dpzo`, one file each: `add` describes the flags, and a function beside it runs the command.

A command returns an `Outcome`, and raises `ValueError` or `OSError` with one sentence for bad input. It imports what it
needs when it runs: transformers takes seconds, and planning needs none of it.
"""
