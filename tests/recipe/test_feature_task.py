"""The task feature-classification, from YAML to a folder that verifies."""

import copy

import pytest

from hf_dpzo.cli.main import main
from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.recipe.loading import load_held_out_rows, load_rows
from hf_dpzo.recipe.recipe import parse_recipe

from support.recipes import refused, table


HEAD = {
    "task": "feature-classification",
    "lora_target_modules": "absent",
    "lora_r": "absent",
    "method": "aggzo",
    "num_directions": 2,
    "expected_batch_size": 70,
}


def test_a_recipe_trains_a_head_that_is_shown_beside_the_untouched_model_and_verifies(write, workplace, capsys):
    assert main(["train", write(**HEAD, layer=1)]) == 0
    shown = table(capsys.readouterr().out)
    assert shown["head"] == str(workplace / "out") and "accuracy after" in shown
    assert main(["verify", str(workplace / "out"), "--base", str(workplace / "causal")]) == 0
    head = FeatureClassifier.from_pretrained(str(workplace / "out"))
    assert head.config.id2label == {0: "bad", 1: "good"}
    assert head.config.layer == 1 and head.center.any()


def test_the_untouched_model_beside_a_head_is_that_beneath_an_untrained_adapter(write, workplace, capsys):
    main(["train", write(**HEAD, layer=1)])
    beside_head = table(capsys.readouterr().out)["accuracy of the untouched model"]
    main(["train", write(output_dir=str(workplace / "adapter"))])
    assert table(capsys.readouterr().out)["accuracy before"] == beside_head


def test_the_untouched_model_may_have_a_template_of_its_own(write, workplace, capsys):
    main(["train", write(**HEAD, layer=1, template="so {text}", untouched_template="{text} :")])
    beside_head = table(capsys.readouterr().out)["accuracy of the untouched model"]
    main(["train", write(output_dir=str(workplace / "adapter"))])
    assert table(capsys.readouterr().out)["accuracy before"] == beside_head


def test_the_untouched_model_is_measured_on_the_rows_of_held_out_users_alone(workplace, tokenizer):
    file = workplace / "users.csv"
    file.write_text("text,label,user\n" + "".join(f"w{i} w{i % 7},{i % 2},u{i // 4}\n" for i in range(40)))
    fields = {
        "model_name_or_path": "model",
        "data": str(file),
        "eval_rows": 2,
        "template": "so {text}",
        "classes": [0, 1],
    }
    fields |= {"task": "feature-classification", "output_dir": "out", "target_epsilon": 2, "target_delta": 1e-5}
    recipe, _ = parse_recipe(fields)
    as_prompt = copy.copy(recipe)
    as_prompt.template = "{text} :"
    _, held_out = load_rows(recipe, tokenizer, kept_column="user")
    rows = load_held_out_rows(recipe, tokenizer, encoded_as=as_prompt, unit_column="user")
    assert len(rows) == len(held_out) == 8
    text = {tuple(row[1:]) for row in held_out["input_ids"]}
    assert {tuple(row[:-1]) for row in rows["input_ids"]} == text


def test_label_words_of_a_model_that_continues_no_text_are_refused(write, workplace, capsys):
    changes = {**HEAD, "model_name_or_path": str(workplace / "classifier")}
    assert "has no head that continues a text" in refused(capsys, "train", write(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**HEAD, "layer": 9}, "layer=9: the base has 2 layers"),
        ({**HEAD, "position": "first"}, "position='first': choose one of last, mean"),
        ({**HEAD, "lora_layers": [1]}, "lora_layers=[1]: a head on features has no adapter"),
        (
            {**HEAD, "label_words": "absent", "classes": [0, 1], "untouched_template": "{text}"},
            "untouched_template='{text}': the untouched model is measured by label_words",
        ),
        ({**HEAD, "untouched_template": "{source}"}, "untouched_template='{source}': it names a column that template"),
        ({"untouched_template": "{text}"}, "untouched_template={text}: only feature-classification reads features"),
        ({"layer": 1}, "layer=1: only feature-classification reads features"),
    ],
)
def test_what_would_be_ignored_or_is_not_there_is_refused(write, capsys, changes, said):
    assert said in refused(capsys, "train", write(**changes))
