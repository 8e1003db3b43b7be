"""What a feature is: the states of one row at one layer, whatever is beside it, and never what lies above."""

import pytest
import torch
from transformers import XLNetConfig, XLNetModel

from hf_dpzo.models.feature_classifier import FeatureClassifier
from hf_dpzo.models.layer_reader import find_body

from support.feature_bases import FAMILIES
from support.models import causal_lm, llama_config, word_tokenizer


NAMES = {0: "no", 1: "yes"}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_states_that_leave_the_layer_and_padding_does_not_move_them(family):
    model = FAMILIES[family]().eval()
    head = FeatureClassifier.on_base(model, id2label=NAMES, layer=2, position="last")
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    body = find_body(model)
    body = body.get_encoder() if body.config.is_encoder_decoder else body
    expected = body(input_ids=tokens, output_hidden_states=True).hidden_states[2][:, -1]
    assert torch.equal(head.read(tokens), expected)
    padded = torch.cat([tokens, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    torch.testing.assert_close(head.read(padded, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_is_read_at_all_tokens_and_a_decoder_at_the_last(family):
    head = FeatureClassifier.on_base(FAMILIES[family]().eval(), id2label=NAMES, layer=2)
    body = find_body(head.base)
    body = body.get_encoder() if body.config.is_encoder_decoder else body
    one, other = (body(input_ids=torch.tensor([[5, 6, last]])).last_hidden_state[0, 0] for last in (7, 8))
    reads_ahead = not torch.equal(one, other)
    assert head.config.position == ("mean" if reads_ahead else "last")


def test_left_padding_does_not_move_a_decoders_features():
    head = FeatureClassifier.on_base(FAMILIES["gpt2"]().eval(), id2label=NAMES, layer=2, position="mean")
    tokens = torch.tensor([[5, 6, 7]])
    padded, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    torch.testing.assert_close(head.read(padded, mask), head.read(tokens), rtol=1e-5, atol=1e-6)


def test_a_row_without_tokens_has_no_features():
    head = FeatureClassifier.on_base(causal_lm(), id2label=NAMES)
    assert head.read(torch.tensor([[5, 6]]), torch.tensor([[0, 0]])).isnan().all()


def test_a_model_whose_states_are_not_row_by_row_is_refused():
    config = XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=16)
    head = FeatureClassifier.on_base(XLNetModel(config).eval(), id2label=NAMES)
    with pytest.raises(ValueError, match="a forward pass does not go through its layers one by one"):
        head.read(torch.tensor([[5, 6, 7]]))


def test_public_texts_are_centred_and_scaled_to_norm_one():
    texts = [f"w{i} w{2 * i % 40} w{7 * i % 40}" for i in range(30)]
    head = FeatureClassifier.on_base(causal_lm(), word_tokenizer(), id2label=NAMES, texts=texts)
    states = torch.cat([head.read_alone(word_tokenizer()(text)["input_ids"]) for text in texts])
    standard = (states - head.center) * head.scale
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(dim=0), torch.ones(16), atol=1e-3, rtol=0)
    row = torch.tensor([word_tokenizer()(texts[0])["input_ids"]])
    torch.testing.assert_close(head.compute_features(row).norm(), torch.tensor(1.0))


def test_moving_a_head_moves_its_base_and_walks_do_not_list_it():
    head = FeatureClassifier.on_base(causal_lm(**{"num_hidden_layers": 1}), id2label=NAMES)
    head.double()
    assert next(head.base.parameters()).dtype == torch.float64
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"center", "scale", "classifier"}
    assert not head.train().base.training
    assert llama_config().hidden_size == head.config.hidden_size
