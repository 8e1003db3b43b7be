#!/usr/bin/env bash
# Decoders of the BART family by themselves in transformers 5.23.0 (torch 2.13.0): AutoModelForCausalLM gives
# BartForCausalLM, whose loss compares what it returns at a token with the label of that same token.
#
# Every other class of that auto class shifts the labels, so that a token predicts the next one. The collator
# for language models makes labels that are the tokens. Trained with it, BartForCausalLM learns to copy: its loss goes
# to nothing, and the next tokens are never learned. MBart, Marian, Pegasus, Blenderbot, PLBart, Mvp, TrOCR
# and Whisper's decoders do the same. Nothing warns.
#
# Seen, on a CPU, after 200 steps of AdamW on random tokens, which nobody can predict:
#   BartForCausalLM: its own loss 0.00
#   GPT2LMHeadModel: its own loss 3.33, the logarithm of 28
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
from transformers import BartConfig, BartForCausalLM, GPT2Config, GPT2LMHeadModel, logging

logging.set_verbosity_error()
bart = dict(vocab_size=32, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64)
gpt2 = dict(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=64)


def train(model):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        tokens = torch.randint(4, 32, (16, 12))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{type(model).__name__}: its own loss {loss.item():.2f}")
    return loss.item()


torch.manual_seed(0)
copied = train(BartForCausalLM(BartConfig(**bart, is_decoder=True, dropout=0.0)))
predicted = train(GPT2LMHeadModel(GPT2Config(**gpt2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)))
sys.exit(not (copied < 0.1 and predicted > 2.5))
PYTHON
