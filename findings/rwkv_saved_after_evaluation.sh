#!/usr/bin/env bash
# RWKV in transformers 5.23.0 (torch 2.13.0): a model of seven layers or more that was evaluated once and is then saved
# is another model when it is loaded.
#
# In evaluation mode the first forward pass halves weights of every sixth block in place (config.rescale_every=6, so
# that float16 does not overflow). save_pretrained writes the halved weights, from_pretrained takes them for whole ones,
# and the next evaluation halves them again. Nothing warns. Saving before any evaluation, or with rescale_every=0, is
# safe.
#
# Seen, on a CPU:
#   never evaluated before saving: largest difference of logits 0
#   evaluated before saving: the logits differ, and blocks.6.attention.output.weight on disk is half of what it was
#   rescale_every=0: largest difference of logits 0
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import torch
from transformers import RwkvConfig, RwkvForCausalLM, logging

logging.set_verbosity_error()
logging.disable_progress_bar()
folder = sys.argv[1]
tokens = torch.tensor([[3, 7, 11, 5]])


def roundtrip(name, *, evaluate, rescale_every):
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=32, attention_hidden_size=32, intermediate_size=64, num_hidden_layers=8)
    model = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=rescale_every)).eval()
    weight = model.rwkv.blocks[6].attention.output.weight
    before = weight.detach().clone()
    with torch.no_grad():
        if evaluate:
            expected = model(tokens).logits
        model.save_pretrained(f"{folder}/{name}")
        if not evaluate:
            expected = model(tokens).logits
        loaded = RwkvForCausalLM.from_pretrained(f"{folder}/{name}").eval()
        saved = loaded.rwkv.blocks[6].attention.output.weight.detach().clone()
        difference = (loaded(tokens).logits - expected).abs().max().item()
    print(f"{name}: largest difference of logits {difference:.3g}; saved weight / weight before = {(saved / before).mean():.3g}")
    return difference, torch.equal(saved, before / 2)


never, _ = roundtrip("never evaluated before saving", evaluate=False, rescale_every=6)
once, halved = roundtrip("evaluated before saving", evaluate=True, rescale_every=6)
without, _ = roundtrip("rescale_every=0", evaluate=True, rescale_every=0)
sys.exit(not (never == 0 and once > 0 and halved and without == 0))
PYTHON
