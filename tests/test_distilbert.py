"""DistilBERT against the transformers classes, and where it differs from BERT."""

import dataclasses

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DistilBertConfig as HFDistilBertConfig

from llm_anatomy.models import distilbert
from llm_anatomy.models.bert import BertConfig, BertForMaskedLM
from llm_anatomy.models.distilbert import DISTILBERT_BASE, DistilBertForMaskedLM
from tests import parity

B, T, V = 3, 7, 29
NAMES = ["DistilBertForMaskedLM", "DistilBertForSequenceClassification"]
SMALL = BertConfig(
    vocab_size=V,
    n_layers=2,
    n_heads=4,
    d_model=24,
    d_ff=20,
    n_positions=16,
    n_segments=1,
    n_labels=5,
)


@st.composite
def distilbert_configs(draw) -> HFDistilBertConfig:
    n_heads = draw(st.sampled_from([1, 2, 3]))
    return HFDistilBertConfig(
        vocab_size=V,
        dim=n_heads * draw(st.sampled_from([4, 6])),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        hidden_dim=draw(st.sampled_from([10, 20])),
        max_position_embeddings=draw(st.integers(T, 16)),
        sinusoidal_pos_embds=draw(st.booleans()),
        dropout=0.3,
        attention_dropout=0.2,
        seq_classif_dropout=0.4,
        num_labels=draw(st.sampled_from([2, 4])),
        pad_token_id=draw(st.sampled_from([0, 3])),
    )


def build(name: str, config: HFDistilBertConfig) -> transformers.PreTrainedModel:
    return parity.randomise(getattr(transformers, name)(config))


def twins(name: str, config: HFDistilBertConfig, dtype: torch.dtype = torch.float32):
    theirs = build(name, config)
    return theirs.to(dtype), parity.twin(theirs, getattr(distilbert, name)).to(dtype)


def some_input(padding: str, pad: int = 0) -> tuple[Tensor, Tensor | None]:
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
@given(distilbert_configs(), paddings, parity.dtypes)
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
@given(distilbert_configs(), paddings)
def test_loss(config, padding):
    theirs, ours = twins("DistilBertForMaskedLM", config)
    tokens, keep = some_input(padding, config.pad_token_id)
    labels = torch.full((B, T), -100)
    labels[:, -1], labels[0, 2] = torch.randint(V, (B,)), 5
    mask = None if keep is None else keep.long()
    want = theirs(tokens, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(parity.mean_loss(ours(tokens, keep), labels), want)


@pytest.mark.parametrize("name", NAMES)
@parity.examples(3)
@given(distilbert_configs())
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
@given(distilbert_configs())
def test_round_trips(name, config):
    parity.check_round_trips(build(name, config), getattr(distilbert, name))


def test_a_repeated_output_layer_in_the_file_is_read_and_checked(tmp_path):
    ours = parity.randomise(DistilBertForMaskedLM(SMALL))
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["vocab_projector.weight"] = ours.bert.token_embedding.weight.detach().clone()
    save_file(tensors, path)
    again = DistilBertForMaskedLM.from_pretrained(tmp_path)
    parity.check_same(again.state_dict(), ours.state_dict())
    save_file({**tensors, "vocab_projector.weight": torch.randn(V, 24)}, path)
    with pytest.raises(ValueError, match=r"vocab_projector\.weight should repeat"):
        DistilBertForMaskedLM.from_pretrained(tmp_path)


def test_parameter_counts_of_the_published_model():
    ours = parity.count(lambda: DistilBertForMaskedLM(DISTILBERT_BASE))
    theirs = parity.count(lambda: transformers.DistilBertForMaskedLM(HFDistilBertConfig()))
    assert ours == theirs == 66_985_530
    encoder = parity.count(lambda: distilbert.DistilBert(DISTILBERT_BASE))
    assert encoder == 66_362_880


def test_it_is_bert_without_segments():
    """The same weights in BERT, whose one segment has the vector zero."""
    ours = parity.randomise(DistilBertForMaskedLM(SMALL))
    bert = BertForMaskedLM(SMALL).eval()
    zeros = {"bert.segment_embedding.weight": torch.zeros(1, 24)}
    bert.load_state_dict({**ours.state_dict(), **zeros})
    tokens, keep = some_input("right")
    assert torch.equal(ours(tokens, keep), bert(tokens, keep=keep))


@torch.no_grad()
def test_padding_reaches_nothing():
    model = parity.randomise(DistilBertForMaskedLM(SMALL))
    tokens, keep = some_input("right")
    got = model(tokens, keep)
    for row in range(B):
        alone = model(tokens[row : row + 1, keep[row]])
        torch.testing.assert_close(got[row, keep[row]], alone[0])


def test_what_it_refuses(tmp_path):
    model = DistilBertForMaskedLM(SMALL)
    tokens = torch.full((B, 16), 5)
    model(tokens)
    with pytest.raises(ValueError, match="17 positions are needed, but the model has 16"):
        model(torch.full((B, 17), 5))
    with pytest.raises(ValueError, match="tells no segments apart"):
        model.bert(tokens, torch.zeros_like(tokens))
    with pytest.raises(ValueError, match="between 0 and 28; got 5 to 29"):
        model(torch.tensor([[5, 29]]))
    for change in ({"n_segments": 2}, {"eps": 1e-5}):
        with pytest.raises(ValueError, match="has 1 segment and an eps of 1e-12"):
            DistilBertForMaskedLM(dataclasses.replace(SMALL, **change))
    BertForMaskedLM(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a 'bert' model; expected 'distilbert'"):
        DistilBertForMaskedLM.from_pretrained(tmp_path)
