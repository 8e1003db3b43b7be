#!/usr/bin/env bash
# dp-accounting 0.6.0 (absl-py 2.5.1): asking the Renyi accountant for an epsilon may configure the logging of the whole
# process, without a line of output.
#
# For some orders RdpAccountant does not converge, and it warns of that by absl.logging.warning. absl gives the root
# logger a handler then (logging.basicConfig()), before it looks at the level of its own logger. So whoever silences the
# warning by logging.getLogger("absl").setLevel(...) sees nothing of it, and still has a process in which
#   - warnings of every other library look otherwise ("WARNING:name:..." in place of the text alone), and
#   - a later logging.basicConfig(level=..., filename=...) of the program does nothing at all.
# Whether it happens depends on noise multiplier, sampling rate and orders.
#
# Seen, on a CPU:
#   handlers of the root logger before: 0, after: 1; lines on standard error: 0
#   basicConfig(level=INFO) of the program has an effect: False
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet dp-accounting==0.6.0 absl-py==2.5.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import contextlib
import io
import logging
import sys

import dp_accounting
from dp_accounting.rdp import RdpAccountant

logging.getLogger("absl").setLevel(logging.ERROR)
before = len(logging.root.handlers)
said = io.StringIO()
with contextlib.redirect_stderr(said):
    accountant = RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(0.06, dp_accounting.GaussianDpEvent(0.9))
    accountant.compose(event, 3).get_epsilon(1e-5)
after = len(logging.root.handlers)
logging.basicConfig(level=logging.INFO)
works = logging.root.level == logging.INFO
lines = len(said.getvalue().splitlines())
print(f"handlers of the root logger before: {before}, after: {after}; lines on standard error: {lines}")
print(f"basicConfig(level=INFO) of the program has an effect: {works}")
sys.exit((before, after, lines, works) != (0, 1, 0, False))
PYTHON
