"""The commands of `hf-dpzo`, one file each: `add_command` describes the flags, and `_run` runs the command.

A command returns an `Outcome`, and raises `ValueError` or `OSError` with one sentence for bad input. It imports heavy
libraries only when it runs, because transformers takes seconds to import, and planning does not need it.
"""
