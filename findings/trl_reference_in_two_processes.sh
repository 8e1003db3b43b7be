#!/usr/bin/env bash
# DPOTrainer of TRL 1.16.0 (datasets 5.2.0, transformers 5.23.0, torch 2.13.0): precompute_ref_log_probs=True with rows
# that were made in memory works in one process, and ends two processes with a FileNotFoundError.
#
# The first process writes the log-probabilities of the reference to a cache file, and all others then read it. They
# agree on the file's fingerprint, but not on its folder: rows that no file holds, such as those of Dataset.from_list,
# have their cache in a temporary folder that each process has for itself. With a fingerprint that is shared, as the
# code says, one would think that the file is.
#
# Seen, on a CPU:
#   one process: the trainer is built
#   two processes: the second one fails, FileNotFoundError: Failed to open local file '/tmp/hf_datasets-.../cache-....arrow'
#
# Exits with 1 if this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0 trl==1.16.0
cat > "$folder/build.py" <<'PYTHON'
import sys

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

disable_progress_bars()
vocabulary = {word: index for index, word in enumerate(["[PAD]", "[EOS]", *"abcdefgh"])}
backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]", unk_token="a")
rows = Dataset.from_list([{"prompt": "a b ", "chosen": "c d", "rejected": "e f g"}] * 8)
sizes = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0))
args = DPOConfig(sys.argv[1], precompute_ref_log_probs=True, use_cpu=True, bf16=False, report_to="none")
DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
print("built")
PYTHON
export HF_HUB_DISABLE_TELEMETRY=1 TQDM_DISABLE=1 OMP_NUM_THREADS=1
one=$("$folder/venv/bin/python" -W ignore "$folder/build.py" "$folder/one" 2>&1 | tail -1)
two=$("$folder/venv/bin/torchrun" --nproc_per_node 2 "$folder/build.py" "$folder/two" 2>&1 | grep -o "FileNotFoundError: .*cache-" | head -1 || true)
echo "one process: $one"
echo "two processes: ${two:-built}"
[[ $one == built && $two == FileNotFoundError* ]]
