"""The card and privacy.json: what they say follows from the ledger, and survives being handled by other libraries."""

import functools
import itertools
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_dpzo import ZOTrainer
from hf_dpzo.auditing.audit import Audit, Check, Roc, audit
from hf_dpzo.privacy.accounting import account, account_for_group, replace_one_epsilon
from hf_dpzo.privacy.queries import GaussianQuery, LaplaceQuery
from hf_dpzo.privacy.rounding import round_up
from hf_dpzo.recipe.tasks.metrics import compute_accuracy
from hf_dpzo.verification.verify import verify

from support.models import one_layer, with_lora
from support.paths import ROOT
from support.rows import labelled_rows
from support.runs import short_args


def run_in(output_dir: Path, tokenizer, *, lora=True, callbacks=None, **changes) -> tuple[ZOTrainer, Path]:
    args = short_args(output_dir, **changes)
    trainer = ZOTrainer(
        model=with_lora(one_layer()) if lora else one_layer(),
        args=args,
        train_dataset=labelled_rows(40),
        eval_dataset=labelled_rows(8, seed=1),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_accuracy,
        callbacks=callbacks,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer, Path(args.output_dir)


@pytest.fixture
def train(tmp_path, tokenizer):
    numbers = itertools.count()
    return lambda **changes: run_in(tmp_path / f"run{next(numbers)}", tokenizer, **changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer) -> tuple[ZOTrainer, Path]:
    """A run as most of them are. Its folder is to be read alone."""
    return run_in(tmp_path_factory.mktemp("plain"), tokenizer)


def statement(folder: Path) -> dict:
    return json.loads((folder / "privacy.json").read_text())


def recomputed(said: dict) -> float:
    """Epsilon, from the ledger in the file."""
    kinds = {"GaussianQuery": GaussianQuery, "LaplaceQuery": LaplaceQuery}
    releases = tuple(
        (
            kinds[one["query"]](noise_multiplier=one["noise_multiplier"], sampling_rate=one["sampling_rate"]),
            one["count"],
        )
        for one in said["accounting"]["ledger"]
    )
    return round_up(account(releases, delta=said["claim"]["delta"]).epsilon)


@pytest.mark.parametrize("lora", [True, False])
def test_card_states_what_the_ledger_says(train, lora):
    trainer, folder = train(lora=lora, method="aggzo", num_directions=3, clip_norm=0.5)
    spent = trainer.budget.guarantee()
    claim, mechanism = statement(folder)["claim"], statement(folder)["mechanism"]
    assert claim["epsilon"] == round_up(spent.epsilon)
    assert claim["delta"] == 1e-4
    assert claim["neighboring_relation"] == "ADD_OR_REMOVE_ONE"
    assert claim["steps_taken"] == claim["steps_claimed"] == 4
    assert mechanism["method"] == "aggzo"
    assert (mechanism["clip_norm"], mechanism["noise_multiplier"], mechanism["num_directions"]) == (0.5, 1.0, 3)
    assert statement(folder)["sampling"]["sampling_rate"] == 0.2
    text = (folder / "README.md").read_text()
    assert f"(ε = {claim['epsilon']}, δ = 0.0001)" in text
    assert "on each row's 3 coefficients" in text
    assert "\n\n\n" not in text


def test_first_line_states_the_guarantee(plain):
    _, folder = plain
    first = ModelCard.load(folder / "README.md").text.strip().splitlines()[0]
    assert first.startswith(
        f"**Fine-tuned with ({statement(folder)['claim']['epsilon']}, 0.0001)-differential privacy**"
    )


def test_first_line_of_a_run_without_noise_says_that_there_is_no_guarantee(train):
    _, folder = train(method="mezo", noise_multiplier="absent", target_delta="absent")
    card = ModelCard.load(folder / "README.md")
    assert card.text.strip().startswith("**This model has no privacy guarantee.**")
    assert statement(folder)["status"] == "NOT_PRIVATE"
    assert statement(folder)["claim"] is None
    assert "differential_privacy" not in card.data.to_dict()
    assert "ε" not in card.text


def test_ledger_in_the_file_gives_the_claim_again(plain):
    _, folder = plain
    assert recomputed(statement(folder)) == statement(folder)["claim"]["epsilon"]


def test_a_run_that_stopped_early_claims_its_whole_plan(train):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer, folder = train(callbacks=[Stop()])
    claim = statement(folder)["claim"]
    assert (claim["steps_taken"], claim["steps_claimed"]) == (1, 4)
    assert claim["epsilon"] == round_up(trainer.budget.guarantee().epsilon)
    assert "1 of 4 planned steps had been released" in (folder / "README.md").read_text()


def test_checkpoint_states_the_guarantee_of_the_whole_plan(train):
    """Whoever publishes it instead of the last one may have looked at both."""
    _, folder = train(save_strategy="steps", save_steps=2)
    early, late = (statement(folder / f"checkpoint-{step}")["claim"] for step in (2, 4))
    assert (early["steps_taken"], late["steps_taken"]) == (2, 4)
    assert early["epsilon"] == late["epsilon"] == statement(folder)["claim"]["epsilon"]


def test_card_survives_pefts_own_card_writing(train):
    trainer, folder = train()
    trainer.model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert "**Guarantee.**" in card.text
    assert card.data.to_dict()["differential_privacy"]["epsilon"] == statement(folder)["claim"]["epsilon"]
    assert {"differential-privacy", "zeroth-order", "hf-dpzo"} <= set(card.data.tags)
    assert card.data.library_name == "peft"


def test_trainers_own_card_writing_writes_this_card(train):
    trainer, folder = train()
    (folder / "README.md").unlink()
    trainer.create_model_card(tags="mine", model_name="x")
    assert "**Guarantee.**" in (folder / "README.md").read_text()
    assert "ADAMW" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(("public", "phrase"), [(True, "data declared public"), (False, "data that were not declared")])
def test_card_says_whether_the_evaluation_data_are_public(train, public, phrase):
    _, folder = train(eval_data_is_public=public)
    assert any(phrase in line for line in statement(folder)["not_covered"])
    assert "eval_accuracy" in (folder / "README.md").read_text()


def test_card_says_how_rows_are_kept_apart(train):
    for settings, status in (
        ({"per_device_train_batch_size": 1}, "bitwise"),
        ({"padded_lengths": [8, 16]}, "bitwise"),
        ({}, "bounded"),
    ):
        _, folder = train(**settings)
        said = statement(folder)["validity_checks"]["numerical_isolation"]
        assert said["status"] == status
        assert 0 <= said["bound_in_clip_norms"] < 1e-3
        assert f"`{status}`: on public rows" in (folder / "README.md").read_text()


def test_card_states_what_holds_for_several_rows_of_one_person(plain):
    trainer, folder = plain
    groups = statement(folder)["claim"]["groups"]
    assert [group["rows"] for group in groups] == [2, 4]
    for group in groups:
        epsilon = account_for_group(trainer.budget.claimed_releases, size=group["rows"], delta=1e-4)
        assert group["epsilon"] == round_up(epsilon) > group["rows"] * statement(folder)["claim"]["epsilon"] / 2
        assert f"ε = {group['epsilon']} for {group['rows']} rows" in (folder / "README.md").read_text()


def test_card_tells_of_the_audit_where_it_was_asked_for(train, plain, monkeypatch):
    monkeypatch.setattr("hf_dpzo.auditing.audit.audit", functools.partial(audit, releases=400))
    _, folder = train(audit=True)
    found = statement(folder)["validity_checks"]["audit"]
    assert found["passed"] and found["releases"] == 400
    assert f"| {found['checks'][0]['name']} | {found['checks'][0]['measured']} |" in (folder / "README.md").read_text()
    assert "\n\n\n" not in (folder / "README.md").read_text()
    assert statement(plain[1])["validity_checks"]["audit"] is None


def test_a_mechanism_that_fails_its_audit_is_not_run(train, monkeypatch):
    failed = Check(name="noise scale", measured="0.5", allowed=">= 1", passed=False)
    roc = Roc(false_alarms=(), detections=(), allowed=())
    bad = Audit(checks=(failed,), roc=roc, mu_lower=2.0, mu_claimed=1.0, releases=200)
    monkeypatch.setattr("hf_dpzo.auditing.audit.audit", lambda method, seed: bad)
    with pytest.raises(RuntimeError, match="audit: noise scale: the mechanism releases more than it claims"):
        train(audit=True)


def test_card_holds_no_training_loss(plain):
    _, folder = plain
    assert "Training Loss" not in (folder / "README.md").read_text()
    assert not {"loss", "train_loss"} & set(statement(folder))


def test_no_card_is_written_where_nothing_was_to_be_trained(make_args, tokenizer):
    args = make_args()
    trainer = ZOTrainer(model=one_layer(), args=args, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.save_model()
    assert not (Path(args.output_dir) / "privacy.json").exists()


CARDS = ROOT / "model_cards"
GALLERY = sorted(path.parent for path in CARDS.glob("*/privacy.json"))


@pytest.mark.parametrize("folder", GALLERY, ids=lambda folder: folder.name)
def test_claims_of_the_gallery_verify(folder):
    """All but the weights, for which the recipes' base model is needed."""
    findings = verify(folder, weights=False)
    assert [one for one in findings if not one.holds] == []
    assert f"ε = {statement(folder)['claim']['epsilon']}" in (folder / "README.md").read_text()


def test_gallery_says_how_each_card_was_made():
    listed = (CARDS / "README.md").read_text()
    assert GALLERY and all(f"[{folder.name}]({folder.name}/README.md)" in listed for folder in GALLERY)


def test_card_of_a_laplace_run_states_both_guarantees(train):
    trainer, folder = train(method="dpzo", noise="laplace", clip_norm=0.05)
    claim, text = statement(folder)["claim"], (folder / "README.md").read_text()
    pure = trainer.budget.guarantee().pure
    assert claim["epsilon"] == round_up(trainer.budget.guarantee().epsilon) <= round_up(pure)
    assert [(one["definition"], one["epsilon"], one["delta"]) for one in claim["also"]] == [
        ("pure epsilon-differential privacy", round_up(pure), 0)
    ]
    assert f"pure ε-differential privacy with ε = {round_up(pure)}, that is, with δ = 0." in text
    assert "discrete Laplace, one draw for each direction and step; OpenDP" in text
    assert ModelCard.load(folder / "README.md").data.to_dict()["differential_privacy"]["pure_epsilon"] == round_up(pure)
    assert "0.05, on each row's difference of losses" in text
    assert recomputed(statement(folder)) == claim["epsilon"]


def test_card_says_that_there_is_twice_the_noise_as_in_the_paper(train):
    trainer, folder = train(paper_noise=True)
    claim, text = statement(folder)["claim"], (folder / "README.md").read_text()
    assert statement(folder)["mechanism"]["noise_multiplier"] == pytest.approx(2.0)
    (other,) = claim["also"]
    assert other["neighboring_relation"] == "REPLACE_ONE"
    assert (
        claim["epsilon"]
        < other["epsilon"]
        == round_up(replace_one_epsilon(trainer.budget.claimed_releases, delta=1e-4))
    )
    assert "twice what adding or removing a row asks for, as in the method's paper" in text
    assert f"(ε = {other['epsilon']}, δ = 0.0001)" in text


def test_card_of_projected_descent_without_noise_says_why_it_is_not_private(train):
    _, folder = train(method="projected", radius=1.0, noise_multiplier=0, target_delta="absent")
    text = ModelCard.load(folder / "README.md").text
    assert text.strip().startswith("**This model has no privacy guarantee.**")
    assert "The random directions of zeroth-order\noptimization promise nothing by themselves" in text
    assert "hf-dpzo audit --demo inherent-privacy" in text
    assert statement(folder)["status"] == "NOT_PRIVATE"
    assert statement(folder)["mechanism"]["sensitivity"] is None


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        (
            {"method": "zoso", "num_directions": 2, "num_stages": 2},
            ["2 difference quotients, each by itself", "stages | 2"],
        ),
        ({"method": "zopo", "num_stages": 2, "pruning_ratio": 0.5}, ["pruning_ratio | 0.5", "mask | static"]),
        ({"method": "projected", "radius": 3.0}, ["radius | 3.0"]),
        ({"method": "aggzo", "num_directions": 2, "difference": "forward"}, ["forward differences", "jointly"]),
        ({"update": "adam"}, ["update | Adam, betas (0.9, 0.999), epsilon 1e-08"]),
    ],
    ids=["zoso", "zopo", "projected", "forward", "adam"],
)
def test_card_says_how_the_model_was_trained(train, settings, phrases):
    _, folder = train(**settings)
    text = (folder / "README.md").read_text()
    assert all(phrase in text for phrase in phrases)
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "mezo", "noise_multiplier": "absent", "target_delta": "absent"},
        {"method": "projected", "radius": 1.0, "noise_multiplier": 0, "target_delta": "absent"},
    ],
    ids=["mezo", "projected"],
)
def test_a_model_without_a_guarantee_is_not_found_among_those_with_one(train, settings):
    trainer, folder = train(**settings)
    assert "differential-privacy" not in ModelCard.load(folder / "README.md").data.tags
    assert "differential-privacy" not in trainer.model.get_base_model().model_tags
