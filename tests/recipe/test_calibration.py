"""Scores of label words less what public texts get: measured once, kept in the log, and stated in the card."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType
from transformers import AutoModelForCausalLM, DataCollatorWithPadding

from hf_dpzo import PUBLIC_TEXTS, Prompt, Trajectory, ZOTrainer, seeded_peft_model
from hf_dpzo.cli.main import main
from hf_dpzo.losses import calibration
from hf_dpzo.recipe.recipe import read_recipe
from hf_dpzo.recipe.run import build_trainer
from hf_dpzo.recipe.tasks.prompt_classification import read_public_texts

from support.models import causal_lm, masked_lm
from support.recipes import refused, table


TEXTS = ("w1 w2", "w3", "w4 w5 w6")


def read_log(folder) -> dict:
    return Trajectory.read(folder).header["calibration"]


@pytest.fixture
def prompt() -> Prompt:
    return Prompt(template="{text} :", label_words=("bad", "good"))


@pytest.mark.parametrize("kind", ["causal", "masked", "several tokens"])
def test_the_median_score_of_public_texts_is_taken_off_for_each_kind_of_word(tokenizer, kind):
    words = ("bad", "very good") if kind == "several tokens" else ("bad", "good")
    template = "{text} {mask} :" if kind == "masked" else "{text} :"
    prompt = Prompt(template=template, label_words=words)
    model = (masked_lm() if kind == "masked" else causal_lm()).eval()
    tokenizer.padding_side = "left"
    plain, centred = prompt.loss(model, tokenizer), prompt.loss(model, tokenizer, calibrate_on=TEXTS, max_length=16)
    rows = [prompt.encode({"text": text}, tokenizer, 16) for text in TEXTS]
    inputs = [{name: torch.tensor([value]) for name, value in row.items()} for row in rows]
    raw = torch.cat([plain.scores(model, one) for one in inputs]).double()
    median = raw.median(dim=0).values
    expected = median - median.mean()
    shifted = torch.cat([centred.scores(model, one) for one in inputs]).double()
    torch.testing.assert_close(raw - shifted, expected.expand_as(raw), atol=1e-4, rtol=0)
    medians = shifted.median(dim=0).values
    torch.testing.assert_close(medians, medians.mean().expand_as(medians), atol=2e-4, rtol=0)  # No word is preferred.
    offsets = centred.calibration.offsets
    again = prompt.loss(model, tokenizer, offsets=offsets)
    assert torch.equal(again.scores(model, inputs[0]), centred.scores(model, inputs[0]))
    labelled = inputs[0] | {"labels": torch.tensor([1])}
    assert not torch.equal(plain(model, labelled), centred(model, labelled))


def test_the_adapter_that_is_trained_has_no_part_in_it(tokenizer, prompt):
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    base = causal_lm().eval()
    alone = prompt.loss(base, tokenizer, calibrate_on=TEXTS).calibration
    model = seeded_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"]), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.train()
    assert prompt.loss(model, tokenizer, calibrate_on=TEXTS).calibration == alone
    assert model.training


def test_what_is_frozen_stays_frozen(tokenizer, prompt):
    tokenizer.padding_side = "left"
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"])
    model = seeded_peft_model(causal_lm(), config, seed=0, freeze_a=True)
    before = [parameter.requires_grad for parameter in model.parameters()]
    prompt.loss(model, tokenizer, calibrate_on=TEXTS)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_offsets_and_texts_that_do_not_fit_are_refused(tokenizer, prompt):
    tokenizer.padding_side = "left"
    model = causal_lm()
    with pytest.raises(ValueError, match=r"offsets=\[1.0\]: there are 2 label words; name one for each"):
        prompt.loss(model, tokenizer, offsets=[1.0])
    with pytest.raises(ValueError, match="calibrate_on: it holds no text"):
        prompt.loss(model, tokenizer, calibrate_on=[])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="calibrate_on: the model's scores of these texts are not finite"):
        prompt.loss(model, tokenizer, calibrate_on=TEXTS)


def test_a_run_states_its_offsets_evaluates_with_them_and_verifies(write, workplace, capsys, monkeypatch):
    assert main(["train", write(calibrate_on="builtin", eval_data_is_public=True)]) == 0
    after = table(capsys.readouterr().out)["accuracy after"]
    out = workplace / "out"
    described = read_log(out)
    assert described["num_texts"] == len(PUBLIC_TEXTS) and len(described["offsets"]) == 2 and any(described["offsets"])
    said = json.loads((out / "privacy.json").read_text())["training"]["calibration"]
    assert said == described
    card = (out / "README.md").read_text()
    assert f"after {len(PUBLIC_TEXTS)} public texts" in card and str(described["offsets"]) in card
    assert main(["verify", str(out), "--base", str(workplace / "causal")]) == 0
    # What was saved, used as the card says, predicts as what was evaluated.
    capsys.readouterr()
    trainer = build_trainer(*read_recipe(write(calibrate_on="builtin", output_dir=str(workplace / "again"))))
    base = AutoModelForCausalLM.from_pretrained(workplace / "causal")
    model = PeftModel.from_pretrained(base, str(out)).eval()
    loss = Prompt(template="{text} :", label_words=("bad", "good")).loss(
        model, trainer.processing_class, offsets=described["offsets"]
    )
    rows = [{name: torch.tensor([row[name]]) for name in row} for row in trainer.eval_dataset]
    right = [int(loss.scores(model, row).argmax()) == int(row["labels"]) for row in rows]
    assert f"{sum(right) / len(right):.4f}" == after
    # The log goes on with its own offsets, also where another device would round otherwise.
    monkeypatch.setattr(calibration, "_DIGITS", 2)
    resumed = build_trainer(*read_recipe(write(calibrate_on="builtin")))
    assert list(resumed.per_example_loss.calibration.offsets) != described["offsets"]
    resumed.train(resume_from_checkpoint=True)
    assert list(resumed.per_example_loss.calibration.offsets) == described["offsets"]


def test_a_run_goes_on_only_with_the_texts_that_it_had(write, workplace, capsys):
    assert main(["train", write()]) == 0
    assert "calibration" not in Trajectory.read(workplace / "out").header
    assert "Label words" not in (workplace / "out" / "README.md").read_text()
    said = refused(capsys, "train", write(calibrate_on="builtin"), "--resume_from_checkpoint", "true")
    assert "calibration" in said and "set what it had" in said


def test_texts_come_from_a_file_of_lines_of_one_column_or_of_the_columns_of_the_template(tmp_path):
    (tmp_path / "lines.txt").write_text("One.\n\nTwo, with a comma.\n")
    lines = [{"text": line} for line in ("One.", "", "Two, with a comma.")]
    assert read_public_texts(str(tmp_path / "lines.txt"), ["text"]) == lines
    assert read_public_texts(str(tmp_path / "lines.txt"), ["title", "body"]) == ["One.", "Two, with a comma."]
    (tmp_path / "pairs.csv").write_text("title,body,other\na,b,c\n")
    assert read_public_texts(str(tmp_path / "pairs.csv"), ["title", "body"]) == [{"title": "a", "body": "b"}]
    with pytest.raises(ValueError, match="it has the columns title, body, other; name those of the template"):
        read_public_texts(str(tmp_path / "pairs.csv"), ["text"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibrate_on": "nowhere.txt"}, "calibrate_on=nowhere.txt: there is no such file; name builtin"),
        (
            {"calibrate_on": "builtin", "task": "causal-lm", "label_words": "absent"},
            "calibrate_on=builtin: only prompt-classification scores words",
        ),
    ],
)
def test_what_can_not_be_calibrated_is_refused(write, capsys, changes, said):
    assert said in refused(capsys, "train", write(**changes))


def test_in_python_a_trainer_keeps_the_offsets_of_its_loss(make_args, tokenizer, prompt):
    tokenizer.padding_side = "left"
    model = seeded_peft_model(causal_lm(), LoraConfig(task_type=TaskType.CAUSAL_LM, r=2), seed=0, freeze_a=True)
    rows = [{**prompt.encode({"text": f"w{i}"}, tokenizer, 8), "labels": i % 2} for i in range(16)]
    loss = prompt.loss(model, tokenizer, calibrate_on=TEXTS)
    args = make_args(max_steps=1)
    ZOTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        per_example_loss=loss,
    ).train()
    assert read_log(args.output_dir) == loss.calibration.describe()
