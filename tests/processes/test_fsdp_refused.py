"""What does not go with a model of which each process holds a part is refused, in each process."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_dpzo import ZOTrainer
from hf_dpzo.models.checks import refuse_unsupported_sharding

from support.models import causal_lm
from support.parts import run, split, whole_model
from support.processes import Here
from support.rows import labelled_rows
from support.runs import short_args


def refused(here: Here, make, settings: dict, folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        run(make, folder, eval_data_is_public=True, eval_dataset=labelled_rows(6), **settings)
    return str(error.value)


def in_parts() -> torch.nn.Module:
    return split(whole_model())


def split_by_hand() -> torch.nn.Module:
    model, mesh = whole_model(), init_device_mesh("cpu", (2,))
    model.score.weight = torch.nn.Parameter(distribute_tensor(model.score.weight.data, mesh, [Shard(0)]))
    return model


def gathered_in_16_bits() -> torch.nn.Module:
    return fully_shard(whole_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def but_for_the_head() -> torch.nn.Module:
    model = whole_model()
    split(model.model)
    return model


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2}
POINTS = r"parallel=points: .* is split over processes, and all processes have to be at"
TOGETHER = r"points_per_pass=2: .* is split over processes, and it needs whole parameters"
MOMENTS = r".*is trained and split over processes, and moments, constraints and masks need all"
CHECKPOINT = r"load_best_model_at_end=True: .* is split over processes, and a checkpoint is not taken apart"


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        pytest.param(in_parts, {"parallel": "points"}, POINTS, id="points"),
        pytest.param(in_parts, {"points_per_pass": 2}, TOGETHER, id="together"),
        pytest.param(in_parts, {"update": "adam"}, MOMENTS, id="adam"),
        pytest.param(in_parts, BEST, CHECKPOINT, id="best"),
    ],
)
def test_what_a_split_model_does_not_go_with_is_refused_in_each_process(make, settings, said, pair, tmp_path):
    assert_refused(pair, make, settings, tmp_path, said)


def test_parts_made_otherwise_are_refused(pair, tmp_path):
    said = r"model: score\.weight is split, and not by fully_shard, which alone"
    assert_refused(pair, split_by_hand, {}, tmp_path, said)


def test_weights_that_are_gathered_in_16_bits_are_refused(pair, tmp_path):
    said = r"mp_policy: weights would be gathered in torch\.bfloat16, which rounds"
    assert_refused(pair, gathered_in_16_bits, {}, tmp_path, said)


def test_what_is_trained_is_in_parts_or_whole(pair, tmp_path):
    said = r"model: .* is trained in parts and score\.weight is not, which stock"
    assert_refused(pair, but_for_the_head, {}, tmp_path, said)


def assert_refused(pair, make, settings: dict, folder: Path, said: str) -> None:
    for found in pair.each(refused, make, settings, folder):
        assert re.match(said, found)


def refused_to_push(here: Here, folder: Path) -> tuple[str, str]:
    """Before training, and after it."""
    here.patch.setattr(ZOTrainer, "init_hf_repo", lambda trainer, token=None, private=None: None)
    before = refused(here, in_parts, {"push_to_hub": True}, folder / "refused")
    trainer = run(in_parts, folder / "run")
    with pytest.raises(ValueError) as error:
        trainer.push_to_hub()
    return before, str(error.value)


def test_what_is_trained_in_parts_is_not_pushed_by_one_process(pair, tmp_path):
    for before, after in pair.each(refused_to_push, tmp_path):
        assert re.match(r"push_to_hub=True: .* is trained and split over processes, and one of", before)
        assert after.startswith("push_to_hub: what is trained is split over processes, and pushing is")


def refused_as_loaded(here: Here, kind: str, base: Path, folder: Path) -> str:
    args, config = short_args(folder), DistributedConfig(**{kind: 2})
    model = AutoModelForCausalLM.from_pretrained(base, distributed_config=config)
    with pytest.raises(ValueError) as error:
        refuse_unsupported_sharding(model, args, distributed_type="MULTI_GPU")
    return str(error.value)


@pytest.mark.parametrize("kind", ["tp_size", "pp_size"])
def test_other_parallelism_of_transformers_is_refused(kind, pair, tmp_path):
    """Some of it stock refuses too, but not on all devices."""
    causal_lm(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    for said in pair.each(refused_as_loaded, kind, tmp_path / "base", tmp_path / "run"):
        assert said.startswith(f"{kind}=2: its processes have no rows of their own; set fsdp_size instead")
