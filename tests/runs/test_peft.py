"""Every kind of adapter: what is frozen stays, what is saved loads, and an interrupted run goes on."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import Trajectory, ZOTrainer, replay_onto, seeded_peft_model
from hf_dpzo.models.unwrap import is_prompt_tuned

from support.adapters import ADAPTERS
from support.models import classifier
from support.rows import few_public_rows, labelled_rows


STEPS = 4


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture
def made(make_args, tokenizer, tmp_path):
    """A trainer of the same new adapter each time. After virtual tokens padding moves losses: rows are alone."""
    base, right = classifier(), copy.deepcopy(tokenizer)
    right.padding_side = "right"  # Prompt tuning with left padding is refused.

    def make(name: str, callbacks=()) -> tuple[torch.nn.Module, ZOTrainer]:
        model = seeded_peft_model(copy.deepcopy(base), copy.deepcopy(ADAPTERS[name]), seed=3)
        shapes = {"per_device_train_batch_size": 1} if is_prompt_tuned(model) else {"padded_lengths": [16]}
        trainer = ZOTrainer(
            model=model,
            args=make_args(output_dir=str(tmp_path / "out"), max_steps=STEPS, **shapes),
            train_dataset=labelled_rows(20),
            data_collator=DataCollatorWithPadding(right),
            probe_rows=few_public_rows(),
            callbacks=list(callbacks),
        )
        return copy.deepcopy(base), trainer

    return make


# BOFT looks for a compiler of its CUDA kernel.
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # Of layers that it can not merge an adapter into.
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_train_resume_and_reload(name, made, tmp_path):
    _, killed = made(name, [Stop()])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    base, trainer = made(name)
    before = {n: p.detach().clone() for n, p in [*trainer.model.named_parameters(), *trainer.model.named_buffers()]}
    fresh = copy.deepcopy(trainer.model)
    trainer.train(resume_from_checkpoint=True)

    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(b, before[n]) for n, b in trainer.model.named_buffers())

    log = Trajectory.read(tmp_path / "out")
    assert len(log.records) == STEPS
    replay_onto(fresh, log)
    assert all(torch.equal(p, dict(trainer.model.named_parameters())[n]) for n, p in fresh.named_parameters())

    trainer.save_model()
    reloaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokens = torch.tensor([[5, 6, 7, 30]])
    assert torch.equal(reloaded(input_ids=tokens).logits, trainer.model.eval()(input_ids=tokens).logits)
