#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0), a frozen model in bfloat16 on a CPU: logits_to_keep=1, which is to spare the logits
# of all positions but the last, takes far more memory, and more time, than all logits would.
#
# The model gives its output layer a slice of the hidden states, [rows, 1, hidden], that is not contiguous. For a weight
# that requires no gradient, torch.nn.functional.linear then multiplies row by row, and first copies the whole weight
# once for each row. Of a contiguous copy of the slice, the same product copies nothing; nor does it for a weight that
# requires a gradient, so that only the bases of adapters are affected.
#
# Seen, for a vocabulary of 49,152, a width of 576 and 16 rows of 28 tokens:
#   the slice: 906 MB allocated; a contiguous copy of it: 2 MB; all positions: 44 MB
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM

shape = dict(vocab_size=49152, hidden_size=576, intermediate_size=576, num_hidden_layers=1)
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=9)).eval().bfloat16().requires_grad_(False)
seen = []
model.lm_head.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
tokens = torch.zeros(16, 28, dtype=torch.long)


def allocated(call):
    with profile(profile_memory=True) as record:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in record.events()) / 1e6


with torch.no_grad():
    model(tokens, logits_to_keep=1)
    model(tokens)
    (last, every), layer = seen, model.lm_head
    layer._forward_pre_hooks.clear()
    slice_, copy, whole = (allocated(lambda: layer(x)) for x in (last, last.contiguous(), every))
print(f"the slice: {slice_:.0f} MB allocated; a contiguous copy of it: {copy:.0f} MB; all positions: {whole:.0f} MB")
sys.exit(not (slice_ > 500 and copy < 10))
PYTHON
