"""Values that are written otherwise than most: read by the stated rule, or refused by a sentence that names them."""

import datasets
import numpy as np
import pytest

from hf_dpzo.recipe.loading import load_model, load_rows, load_tokenizer
from hf_dpzo.recipe.recipe import parse_recipe, read_recipe
from hf_dpzo.recipe.tables import load_tables

from support.data_recipes import data_recipe, letter_tokenizer, spell
from support.models import classifier, word_tokenizer


def texts(path, content, **changes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_tables(data_recipe(path, **changes))[0]["text"][:]


STRAY = {
    "opens": 'text,label\n"Hi he said,0\nsecret,1\n"c" x,1\n',
    "first": 'text,label\n"Hi" he said,0\n',
    "open": 'text,label\n"Hi he said,0\nsecret,1\n',
}


@pytest.mark.parametrize("content", STRAY.values(), ids=STRAY)
def test_a_stray_quote_swallows_no_row(tmp_path, content):
    with pytest.raises(
        ValueError, match=r"its rows do not have the cells .*line \d+.* write quotes in them twice"
    ) as got:
        texts(tmp_path / "rows.csv", content)
    assert "secret" not in str(got.value)


def test_quotes_and_blank_lines_of_tables_are_read(tmp_path):
    found = texts(tmp_path / "rows.csv", 'text,label\n\n"a\nb",0\n"say ""x""",1\n5" disk,0\n' + "y" * 200_000 + ",1\n")
    assert found == ["a\nb", 'say "x"', '5" disk', "y" * 200_000]


def test_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="it has two columns text; rename one"):
        texts(tmp_path / "rows.csv", "text,text,label\na,b,1\n")


@pytest.mark.parametrize("mark", ["\u2028", "\u0085"])
def test_lines_of_json_end_at_newlines_alone(tmp_path, mark):
    found = texts(tmp_path / "rows.json", f'{{"text": "a{mark}b", "label": 0}}\n{{"text": "c", "label": 1}}\n')
    assert found == [f"a{mark}b", "c"]


@pytest.mark.parametrize("encoding", [None, "utf-8", "UTF8"])
def test_a_mark_of_unicode_is_no_text(tmp_path, encoding):
    changes = {"task": "causal-lm", "label_words": None, "encoding": encoding}
    assert texts(tmp_path / "rows.txt", b"\xef\xbb\xbfgood\n", **changes) == ["good"]


@pytest.mark.parametrize("separator", [r"\t", "\t"])
def test_a_tab_may_be_written_as_in_code(tmp_path, separator):
    assert texts(tmp_path / "rows.csv", "text\tlabel\na\t1\n", separator=separator) == ["a"]


REFUSED = [
    ({"separator": "||"}, "separator='||': it must be one character"),
    ({"separator": ""}, "separator='': it must be one character"),
    ({"eval_share": "nan"}, "eval_share=nan: it is a share of the rows"),
    ({"eval_share": 5}, "eval_share=5.0: it is a share of the rows"),
    ({"train_share": 1}, "train_share=1.0: it is a share of the rows"),
    ({"max_length": 0}, "max_length=0: a row needs a token"),
    ({"template": "{stars:.2f}"}, "template='{stars:.2f}': what follows a column's name in braces"),
    ({"template": "{text!x}"}, "template='{text!x}': what follows a column's name in braces"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_values_that_mean_nothing_are_refused_by_name(changes, message):
    with pytest.raises(ValueError) as caught:
        data_recipe("rows.csv", **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("values", [["--", "++"], ["-neg", "pos"], ["---", "NA"], ["-1", "1"], ["\\-a", "--max_steps"]])
def test_names_may_begin_with_a_hyphen(tmp_path, values):
    path = tmp_path / "recipe.yaml"
    fields = f"missing_words: {values}\nclasses: {values}\n".replace("\\\\", "\\")
    base = "model_name_or_path: none\ndata: rows.csv\ntask: sequence-classification\noutput_dir: out\n"
    path.write_text(base + "method: mezo\nmax_steps: 1\nexpected_batch_size: 2\n" + fields)
    recipe, _ = read_recipe(path)
    again, _ = parse_recipe({}, recipe.flags)
    assert [*recipe.labels] == recipe.missing_words == [*again.labels] == again.missing_words == values


def test_numbers_of_few_bits_are_written_as_they_were(tmp_path):
    path = tmp_path / "rows.parquet"
    for kind in (np.float32, np.float16, np.float64):
        features = datasets.Features({"text": datasets.Value(np.dtype(kind).name), "label": datasets.Value("int64")})
        cells = np.array([0.1, 4, 1.5e-5], kind)
        datasets.Dataset.from_dict({"text": cells, "label": [0, 1, 1]}, features).to_parquet(path)
        rows, _ = load_rows(data_recipe(path), letter_tokenizer())
        assert [spell(row["input_ids"]) for row in rows][:2] == ["0.1", "4"]


def test_the_training_data_by_another_name_are_no_evaluation_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.csv").symlink_to("rows.csv")
    for other in ("./rows.csv", "link.csv", str(tmp_path / "rows.csv")):
        with pytest.raises(ValueError, match="it is the training data"):
            texts(tmp_path / "rows.csv", "text,label\na,1\n", data="rows.csv", eval_data=other)


def test_a_column_of_units_that_is_not_there_gets_one_sentence(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,0\n")
    with pytest.raises(ValueError, match=r"^privacy_unit_column=user: the data have no column user, only text, label"):
        load_tables(data_recipe(tmp_path / "rows.csv", eval_rows=1), unit_column="user")


def test_a_label_that_another_program_writes_moves_no_row(tmp_path):
    held = []
    for label in ("1", "1.0"):
        path = tmp_path / f"{label}.csv"
        path.write_text("text,label\n" + "".join(f"row {row},{label}\n" for row in range(50)))
        held.append(load_tables(data_recipe(path, eval_rows=20))[1]["text"][:])
    assert held[0] == held[1]


def test_a_head_of_another_width_gets_one_sentence(tmp_path):
    classifier(num_labels=3).save_pretrained(tmp_path / "model")
    names = {"model_name_or_path": str(tmp_path / "model"), "label_words": None, "classes": ["a", "b"]}
    recipe = data_recipe("rows.csv", task="sequence-classification", **names)
    with pytest.raises(ValueError, match=r"classes=a, b: the head of .* has not 2 outputs; name as many classes"):
        load_model(recipe, word_tokenizer(), seed=0)


def test_a_tokenizer_that_can_not_pad_gets_one_sentence(tmp_path):
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="its tokenizer has no token to pad rows with"):
        load_tokenizer(data_recipe("rows.csv", model_name_or_path=str(tmp_path)))


def test_a_recipe_of_another_encoding_gets_one_sentence(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("data: caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe=.*: it is not text in UTF-8; save it as such\.$"):
        read_recipe(tmp_path / "recipe.yaml")
