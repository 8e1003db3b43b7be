#!/usr/bin/env bash
# Question answering in transformers 5.23.0 (torch 2.13.0): the loss of a row depends on how long the longest row of its
# batch is, though padding is masked.
#
# The cross-entropy over the places of an answer is taken over the whole width of the batch. The attention mask keeps
# padding out of the attention and not out of the loss, so that its scores stand among the wrong answers. A batch of one
# row with padding has another loss than the row alone; token classification, for example, has not.
#
# Seen, on a CPU:
#   BertForQuestionAnswering: alone 1.69, padded to 64 tokens 4.26
#   BertForTokenClassification: alone 0.64, padded to 64 tokens 0.64
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
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification, logging

logging.set_verbosity_error()
config = BertConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
)
tokens = torch.tensor([[3, 7, 11, 5, 9]])
padded = torch.nn.functional.pad(tokens, (0, 59))
mask = (padded != 0).long()


def losses(kind, labels, padded_labels):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        alone = model(tokens, attention_mask=torch.ones_like(tokens), **labels).loss.item()
        beside = model(padded, attention_mask=mask, **padded_labels).loss.item()
    print(f"{kind.__name__}: alone {alone:.2f}, padded to {padded.shape[1]} tokens {beside:.2f}")
    return abs(alone - beside)


places = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])}
classes = torch.tensor([[0, 1, 0, 1, 1]])
moved = losses(BertForQuestionAnswering, places, places)
kept = losses(
    BertForTokenClassification,
    {"labels": classes},
    {"labels": torch.nn.functional.pad(classes, (0, 59), value=-100)},
)
sys.exit(not (moved > 1 and kept < 1e-5))
PYTHON
