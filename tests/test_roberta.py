"""RoBERTa against the transformers classes, and where it differs from BERT."""

import dataclasses

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import RobertaConfig as HFRobertaConfig

from llm_anatomy.models import roberta
from llm_anatomy.models.bert import BertConfig, BertForMaskedLM
from llm_anatomy.models.roberta import RobertaForMaskedLM
from tests import parity

B, T, V = 3, 7, 29
NAMES = ["RobertaForMaskedLM", "RobertaForSequenceClassification"]
SMALL = BertConfig(
    vocab_size=V,
    n_layers=2,
    n_heads=4,
    d_model=24,
    d_ff=20,
    n_positions=16,
    n_segments=1,
    n_labels=5,
    eps=1e-5,
    pad_id=1,
)


@st.composite
def roberta_configs(draw) -> HFRobertaConfig:
    n_heads = draw(st.sampled_from([1, 2, 3]))
    return HFRobertaConfig(
        vocab_size=V,
        hidden_size=n_heads * draw(st.sampled_from([4, 6])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=n_heads,
        intermediate_size=draw(st.sampled_from([10, 20])),
        max_position_embeddings=draw(st.integers(T + 4, 16)),
        type_vocab_size=draw(st.integers(1, 2)),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.2,
        classifier_dropout=draw(st.sampled_from([None, 0.5])),
        num_labels=draw(st.sampled_from([2, 4])),
        pad_token_id=draw(st.sampled_from([1, 3])),
    )


def build(name: str, config: HFRobertaConfig) -> transformers.PreTrainedModel:
    return parity.randomise(getattr(transformers, name)(config))


def twins(name: str, config: HFRobertaConfig, dtype: torch.dtype = torch.float32):
    theirs = build(name, config)
    return theirs.to(dtype), parity.twin(theirs, getattr(roberta, name)).to(dtype)


def some_input(padding: str, pad: int = 1) -> tuple[Tensor, Tensor | None]:
    """Tokens, and True at real ones: the rows have lengths T, T - 3 and 2."""
    tokens = torch.randint(4, V, (B, T))
    if padding == "none":
        return tokens, None
    keep = torch.arange(T) < torch.tensor([[T], [T - 3], [2]])
    keep = keep if padding == "right" else keep.flip(1)
    return tokens.masked_fill(~keep, pad), keep


paddings = st.sampled_from(["none", "right", "left"])


@pytest.mark.parametrize("name", NAMES)
@parity.examples(10)
@given(roberta_configs(), paddings, parity.dtypes)
def test_logits_and_gradients(name, config, padding, dtype):
    theirs, ours = twins(name, config, dtype)
    tokens, keep = some_input(padding, config.pad_token_id)
    got = ours(tokens, keep)
    want = theirs(tokens, attention_mask=None if keep is None else keep.long()).logits
    torch.testing.assert_close(got, want, **parity.TOLERANCE[dtype])
    got.square().mean().backward()
    want.square().mean().backward()
    parity.check_gradients(ours, theirs, **parity.TOLERANCE[dtype])


@parity.examples(4)
@given(roberta_configs(), paddings)
def test_loss(config, padding):
    theirs, ours = twins("RobertaForMaskedLM", config)
    tokens, keep = some_input(padding, config.pad_token_id)
    labels = torch.full((B, T), -100)
    labels[:, -1], labels[0, 2] = torch.randint(V, (B,)), 5
    mask = None if keep is None else keep.long()
    want = theirs(tokens, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(parity.mean_loss(ours(tokens, keep), labels), want)


@pytest.mark.parametrize("name", NAMES)
@parity.examples(3)
@given(roberta_configs())
def test_drops_what_theirs_drops(name, config):
    """With the same seed the same features are dropped, in the same order."""
    theirs, ours = (model.train() for model in twins(name, config))
    tokens, keep = some_input("right", config.pad_token_id)
    torch.manual_seed(1)
    want = theirs(tokens, attention_mask=keep.long()).logits
    torch.manual_seed(1)
    torch.testing.assert_close(ours(tokens, keep), want)


@pytest.mark.parametrize("name", NAMES)
@parity.examples(3)
@given(roberta_configs())
def test_round_trips(name, config):
    parity.check_round_trips(build(name, config), getattr(roberta, name))


def test_an_untrained_pooler_in_the_file_is_passed_over(tmp_path):
    ours = parity.randomise(RobertaForMaskedLM(SMALL))
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["roberta.pooler.dense.weight"] = torch.randn(24, 24)
    tensors["roberta.pooler.dense.bias"] = torch.randn(24)
    tensors["roberta.embeddings.position_ids"] = torch.arange(16)[None]
    tensors["lm_head.decoder.weight"] = ours.bert.token_embedding.weight.detach().clone()
    save_file(tensors, path)
    parity.check_same(RobertaForMaskedLM.from_pretrained(tmp_path).state_dict(), ours.state_dict())


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(roberta.ROBERTA_BASE, 124_697_433), (roberta.ROBERTA_LARGE, 355_412_057)],
)
def test_parameter_counts_of_the_published_models(config, parameters):
    assert parity.count(lambda: RobertaForMaskedLM(config)) == parameters


def test_it_is_bert_with_its_positions_moved():
    """The same weights in BERT, whose table starts where RoBERTa's second token stands."""
    ours = parity.randomise(RobertaForMaskedLM(SMALL))
    bert = BertForMaskedLM(dataclasses.replace(SMALL, n_positions=14)).eval()
    state = ours.state_dict()
    state["bert.position_embedding.weight"] = state["bert.position_embedding.weight"][2:]
    bert.load_state_dict(state)
    tokens, _ = some_input("none")
    assert torch.equal(ours(tokens), bert(tokens))


@torch.no_grad()
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_reaches_nothing_and_shifts_nothing(padding):
    model = parity.randomise(RobertaForMaskedLM(SMALL))
    tokens, keep = some_input(padding)
    got = model(tokens, keep)
    for row in range(B):
        alone = model(tokens[row : row + 1, keep[row]])
        torch.testing.assert_close(got[row, keep[row]], alone[0])


def test_padding_trains_neither_its_token_nor_its_position():
    model = parity.randomise(RobertaForMaskedLM(SMALL))
    tokens, keep = some_input("right")
    model.bert(tokens, keep=keep).square().sum().backward()
    for table in (model.bert.token_embedding, model.bert.position_embedding):
        assert not table.weight.grad[1].any() and table.weight.grad.any()


def test_fresh_padding_vectors_are_zero():
    model = RobertaForMaskedLM(SMALL)
    for table in (model.bert.token_embedding, model.bert.position_embedding):
        assert not table.weight[1].any() and table.weight[2].any()


def test_the_context_is_two_shorter_than_the_table():
    model = parity.randomise(RobertaForMaskedLM(SMALL))
    model(torch.full((B, 14), 5))
    with pytest.raises(ValueError, match="15 positions are needed, but the model has 14"):
        model(torch.full((B, 15), 5))


def test_no_padding_token_to_number_positions_from():
    with pytest.raises(ValueError, match="from pad_id on, which must not be None"):
        RobertaForMaskedLM(dataclasses.replace(SMALL, pad_id=None))


def test_a_checkpoint_of_bert(tmp_path):
    BertForMaskedLM(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a 'bert' model; expected 'roberta'"):
        RobertaForMaskedLM.from_pretrained(tmp_path)
