"""A head on features, whose steps several processes take together."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaModel

from hf_dpzo import FeatureClassifier

from support.models import llama_config, word_tokenizer
from support.processes import Here, alone, frozen
from support.runs import fingerprint, released, train


def trained(here: Here, parallel: str, folder: Path) -> str:
    if parallel == "points":  # What the others draw is not used.
        frozen(Here(rank=0, size=1, patch=here.patch), seed=here.rank)
    else:
        frozen(here)
    torch.manual_seed(0)
    base = LlamaModel(llama_config())
    head = FeatureClassifier.on_base(
        base, word_tokenizer(), id2label={0: "no", 1: "yes"}, texts=["w1 w2", "w3", "w4 w9"]
    )
    settings = {"method": "aggzo", "num_directions": 3, "learning_rate": 1.0, "padded_lengths": None}
    return fingerprint(train(folder, model=head, parallel=parallel, **settings))


@pytest.mark.parametrize("parallel", ["points", "examples"])
def test_several_processes_release_what_one_does(parallel, launched, tmp_path):
    one = alone(trained, parallel, tmp_path / "one")
    assert launched[2].each(trained, parallel, tmp_path / "several") == [one, one]
    assert released(tmp_path / "one") == released(tmp_path / "several")
