#!/usr/bin/env bash
# PEFT 0.21.2 (transformers 5.23.0, torch 2.13.0): after one call that fails, the base model inside an activated LoRA
# (LoraConfig(alora_invocation_tokens=...)) is no longer the base model.
#
# LoraModel tells its layers by forward pre-hooks where each row of a call is activated, and removes the hooks behind a
# yield without finally. A call that raises (a token out of the vocabulary, a refused beam search, out of memory) leaves
# one hook in each layer, for good. get_base_model()(...), which was the base until then, computes with the adapter at
# the places of the call that failed; with another number of rows it raises an IndexError. Calls of the PeftModel itself
# stay right, and each that fails leaves one hook more. An ordinary LoRA leaves none.
#
# Seen, on a CPU:
#   hooks before the call that fails: 0, after it: 2, after two: 4
#   get_base_model() before it: the base to the bit; after it: differs
#   with another number of rows: IndexError
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5, 6])
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config).eval()
for parameter in model.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter)
row = torch.tensor([[9, 8, 7, 3]])  # Without the invocation: the base in any case.


def count_hooks():
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def fail():
    try:
        model(input_ids=torch.tensor([[9, 5, 6, 64]]))  # 64 is no token.
    except IndexError:
        pass


with torch.no_grad():
    with model.disable_adapter():
        base = model(input_ids=row).logits
    before, first = model.get_base_model()(input_ids=row).logits, count_hooks()
    fail()
    after, second = model.get_base_model()(input_ids=row).logits, count_hooks()
    try:
        model.get_base_model()(input_ids=row.repeat(2, 1))
        other = "no error"
    except IndexError:
        other = "IndexError"
    right = torch.equal(model(input_ids=row).logits, base)
    fail()
    third = count_hooks()
print(f"hooks before the call that fails: {first}, after it: {second}, after two: {third}")
print(f"get_base_model() before it: largest difference from the base {(before - base).abs().max():.3g}")
print(f"get_base_model() after it: largest difference from the base {(after - base).abs().max():.3g}")
print(f"with another number of rows: {other}; the PeftModel itself is right: {right}")
changed = (first, second, third) != (0, 2, 4) or not torch.equal(before, base) or torch.equal(after, base)
sys.exit(changed or other != "IndexError" or not right)
PYTHON
