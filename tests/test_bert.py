"""BERT and each of its heads against the transformers class of the same name."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig as HFBertConfig

from llm_anatomy.models import bert
from llm_anatomy.models.bert import BertConfig, BertForPreTraining
from tests import parity

B, T, V, PAD = 3, 7, 29, 0
NAMES = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]
SMALL = BertConfig(
    vocab_size=V, n_layers=2, n_heads=4, d_model=24, d_ff=20, n_positions=16, n_labels=5
)


@st.composite
def bert_configs(draw) -> HFBertConfig:
    n_heads = draw(st.sampled_from([1, 2, 3]))
    return HFBertConfig(
        vocab_size=V,
        hidden_size=n_heads * draw(st.sampled_from([4, 6])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=n_heads,
        intermediate_size=draw(st.sampled_from([10, 20])),
        max_position_embeddings=draw(st.integers(T, 12)),
        type_vocab_size=draw(st.integers(2, 3)),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-3])),
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.2,
        classifier_dropout=draw(st.sampled_from([None, 0.5])),
        num_labels=draw(st.sampled_from([2, 4])),
        pad_token_id=draw(st.sampled_from([PAD, None])),
    )


def build(name: str, config: HFBertConfig) -> transformers.PreTrainedModel:
    if name == "BertForQuestionAnswering":  # a start and an end, however many labels there are
        config.num_labels = 2
    return parity.randomise(getattr(transformers, name)(config))


def twins(name: str, config: HFBertConfig, dtype: torch.dtype = torch.float32):
    theirs = build(name, config)
    return theirs.to(dtype), parity.twin(theirs, getattr(bert, name)).to(dtype)


def some_input(padded: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, their segments, and True at real tokens: the rows have lengths T, T - 3 and 2."""
    tokens = torch.randint(1, V, (B, T))
    segments = (torch.arange(T) >= torch.tensor([[3], [2], [1]])).long()
    keep = torch.arange(T) < torch.tensor([[T], [T - 3], [2]])
    return tokens.masked_fill(~keep, PAD) if padded else tokens, segments, keep if padded else None


def outputs(theirs, tokens: Tensor, segments: Tensor, keep: Tensor | None) -> list[Tensor]:
    mask = None if keep is None else keep.long()
    output = theirs(tokens, token_type_ids=segments, attention_mask=mask)
    return list(output.values())


def listed(output: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


# --- Parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@parity.examples(6)
@given(bert_configs(), st.booleans(), parity.dtypes)
def test_outputs(name, config, padded, dtype):
    theirs, ours = twins(name, config, dtype)
    tokens, segments, keep = some_input(padded)
    want = outputs(theirs, tokens, segments, keep)
    got = listed(ours(tokens, segments, keep))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **parity.TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
@parity.examples(4)
@given(bert_configs(), st.booleans(), parity.dtypes)
def test_gradients(name, config, padded, dtype):
    """Of a loss that every output has a share in."""
    theirs, ours = twins(name, config, dtype)
    tokens, segments, keep = some_input(padded)
    sum(x.square().mean() for x in outputs(theirs, tokens, segments, keep)).backward()
    sum(x.square().mean() for x in listed(ours(tokens, segments, keep))).backward()
    parity.check_gradients(ours, theirs, **parity.TOLERANCE[dtype])


@parity.examples(4)
@given(bert_configs(), st.booleans())
def test_the_loss_of_pre_training_is_that_of_both_tasks(config, padded):
    theirs, ours = twins("BertForPreTraining", config)
    tokens, segments, keep = some_input(padded)
    labels = torch.full((B, T), -100)
    labels[:, 1], labels[0, 4] = torch.randint(V, (B,)), 5
    follows = torch.tensor([0, 1, 1])
    want = theirs(
        tokens,
        token_type_ids=segments,
        attention_mask=None if keep is None else keep.long(),
        labels=labels,
        next_sentence_label=follows,
    ).loss
    mlm, nsp = ours(tokens, segments, keep)
    torch.testing.assert_close(parity.mean_loss(mlm, labels) + F.cross_entropy(nsp, follows), want)


@pytest.mark.parametrize(
    ("name", "shape", "most"),
    [
        ("BertForMaskedLM", (B, T), V),
        ("BertForSequenceClassification", (B,), 2),
        ("BertForTokenClassification", (B, T), 2),
    ],
)
@parity.examples(3)
@given(bert_configs())
def test_the_loss_of_fine_tuning(name, shape, most, config):
    theirs, ours = twins(name, config)
    tokens, segments, keep = some_input()
    labels = torch.randint(most, shape)
    want = theirs(tokens, token_type_ids=segments, attention_mask=keep.long(), labels=labels).loss
    torch.testing.assert_close(parity.mean_loss(ours(tokens, segments, keep), labels), want)


@pytest.mark.parametrize("name", NAMES)
@parity.examples(2)
@given(bert_configs())
def test_drops_what_theirs_drops(name, config):
    """With the same seed the same features are dropped, in the same order."""
    theirs, ours = (model.train() for model in twins(name, config))
    arguments = some_input()
    torch.manual_seed(1)
    want = outputs(theirs, *arguments)
    torch.manual_seed(1)
    for a, b in zip(listed(ours(*arguments)), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
@parity.examples(2)
@given(bert_configs())
def test_round_trips(name, config):
    parity.check_round_trips(build(name, config), getattr(bert, name))


def test_segments_are_zero_unless_given():
    model = parity.randomise(BertForPreTraining(SMALL))
    tokens, _, keep = some_input()
    got, want = model(tokens, keep=keep), model(tokens, torch.zeros_like(tokens), keep)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_file_of_2018_names_the_norms_otherwise_and_stores_the_output_layer(tmp_path):
    ours = parity.randomise(BertForPreTraining(SMALL))
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in load_file(path).items()
    }
    old["cls.predictions.decoder.weight"] = ours.bert.token_embedding.weight.detach().clone()
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(old, path)
    parity.check_same(BertForPreTraining.from_pretrained(tmp_path).state_dict(), ours.state_dict())
    old["cls.predictions.decoder.weight"] += 1
    save_file(old, path)
    with pytest.raises(ValueError, match=r"decoder\.weight should repeat"):
        BertForPreTraining.from_pretrained(tmp_path)


def test_a_head_is_put_on_a_pretrained_encoder():
    pretrained = parity.randomise(BertForPreTraining(SMALL))
    model = bert.BertForSequenceClassification(SMALL).eval()
    model.bert, model.pooler = pretrained.bert, pretrained.pooler
    tokens, segments, keep = some_input()
    pooled = pretrained.pooler(pretrained.bert(tokens, segments, keep))
    assert torch.equal(model(tokens, segments, keep), model.classifier(pooled))


@pytest.mark.parametrize(
    ("config", "parameters"), [(bert.BERT_BASE, 109_482_240), (bert.BERT_LARGE, 335_141_888)]
)
def test_parameter_counts_of_the_published_models(config, parameters):
    assert parity.count(lambda: bert.BertModel(config)) == parameters
    D, V_ = config.d_model, config.vocab_size
    heads = (D * D + D + 2 * D + V_) + (2 * D + 2)  # masked tokens, next sentence
    assert parity.count(lambda: BertForPreTraining(config)) == parameters + heads


# --- Invariants -----------------------------------------------------------------------------------


@pytest.fixture
def model() -> BertForPreTraining:
    return parity.randomise(BertForPreTraining(SMALL))


@torch.no_grad()
def test_padding_reaches_nothing(model):
    tokens, segments, keep = some_input()
    mlm, nsp = model(tokens, segments, keep)
    other = torch.where(keep, tokens, (tokens + 5) % V)
    mlm_other, nsp_other = model(other, segments, keep)
    assert torch.equal(mlm_other[keep], mlm[keep]) and torch.equal(nsp_other, nsp)
    for row, n in enumerate(keep.sum(dim=1)):
        alone, nsp_alone = model(tokens[row : row + 1, :n], segments[row : row + 1, :n])
        torch.testing.assert_close(mlm[row, :n], alone[0])
        torch.testing.assert_close(nsp[row], nsp_alone[0])


@torch.no_grad()
def test_every_position_sees_every_other_one(model):
    tokens, segments, _ = some_input(padded=False)
    before = model(tokens, segments)[0]
    for t in range(T):
        changed = tokens.clone()
        changed[:, t] = changed[:, t] % (V - 1) + 1
        after = model(changed, segments)[0]
        assert (after - before).abs().amax(dim=-1).min() > 1e-4


def test_every_parameter_gets_a_gradient(model):
    tokens, segments, _ = some_input(padded=False)
    sum(x.square().sum() for x in model.double()(tokens, segments)).backward()
    for name, p in model.named_parameters():
        moved = p.grad.abs().max()
        # the bias of the keys adds one number to a whole row of scores: no softmax can see it
        assert moved < 1e-6 if name.endswith("k_proj.bias") else moved > 1e-3, name


def test_reading_the_padding_token_does_not_train_its_vector():
    model = parity.randomise(bert.BertModel(SMALL))
    tokens, segments, _ = some_input()
    model(tokens, segments)[0].square().sum().backward()
    gradient = model.bert.token_embedding.weight.grad
    assert not gradient[PAD].any() and gradient[tokens[0, 0]].any()


@pytest.mark.parametrize("name", NAMES)
def test_fresh_weights_are_those_of_the_paper_s_code(name):
    model = getattr(bert, name)(dataclasses.replace(SMALL, d_model=96, d_ff=384))
    assert not model.bert.token_embedding.weight[PAD].any()
    for key, p in model.named_parameters():
        if p.ndim == 2 and "segment" not in key and "token_embedding" not in key and len(p) > 5:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), key
        elif key.endswith("bias"):
            assert not p.any(), key


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, V])
def test_tokens_outside_the_vocabulary(model, bad):
    tokens, segments, keep = some_input()
    tokens[1, 2] = bad
    with pytest.raises(ValueError, match=f"token ids must lie between 0 and 28; got .*{bad}"):
        model(tokens, segments, keep)


@pytest.mark.parametrize("bad", [-1, 2])
def test_segments_that_do_not_exist(model, bad):
    tokens, segments, keep = some_input()
    segments[1, 2] = bad
    with pytest.raises(ValueError, match=f"segments must lie between 0 and 1; got .*{bad}"):
        model(tokens, segments, keep)


@pytest.mark.usefixtures("unchecked")
def test_a_keep_of_another_shape(model):
    tokens, segments, keep = some_input()
    message = r"keep must be boolean and of shape \(3, 7\).* it is torch"
    for wrong in (keep[:, :6], keep[:2], keep.long()):
        with pytest.raises(ValueError, match=message):
            model(tokens, segments, wrong)


def test_an_empty_text(model):
    with pytest.raises(ValueError, match=r"is empty: it has shape \(3, 0\)"):
        model(torch.zeros(B, 0, dtype=torch.long))


def test_a_text_longer_than_the_context(model):
    with pytest.raises(ValueError, match="17 positions are needed, but the model has 16"):
        model(torch.ones(B, 17, dtype=torch.long))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act to 'relu'; this model supports 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type to 'relative_key'"),
        ({"is_decoder": True}, "is_decoder to True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings to False"),
        ({"hidden_size": 24.0}, "d_model must be of type int, got 24.0"),
        ({"pad_token_id": V}, r"pad_id \(29\) must be below vocab_size \(29\)"),
    ],
)
def test_configs_that_are_another_model(change, message):
    with pytest.raises(ValueError, match=message):
        BertForPreTraining.config_from_hf(BertForPreTraining.config_to_hf(SMALL) | change)


def test_a_checkpoint_of_another_architecture(tmp_path):
    parity.randomise(
        transformers.RobertaModel(
            transformers.RobertaConfig(vocab_size=V, hidden_size=24, num_attention_heads=4)
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a 'roberta' model; expected 'bert'"):
        BertForPreTraining.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_head(tmp_path):
    """A model is never filled up with weights that nobody trained."""
    bert.BertForMaskedLM(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks bert\.pooler\.dense\.weight"):
        BertForPreTraining.from_pretrained(tmp_path)
    BertForPreTraining(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tensors that no rule knows: bert\.pooler\.dense\.bias"):
        bert.BertForMaskedLM.from_pretrained(tmp_path)
