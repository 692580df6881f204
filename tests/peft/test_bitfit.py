"""BitFit: which numbers train, against the paper's counts and peft's LoRA with all biases."""

import peft
import pytest
import torch
from torch import nn

from llm_anatomy.models.bert import BERT_BASE, BERT_LARGE, BertModel
from llm_anatomy.peft import bitfit, targets
from llm_anatomy.peft.bitfit import BitFitConfig
from tests.peft import twins


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_trains_the_biases_that_peft_calls_so(kind):
    """peft has BitFit as `bias="all"` beside LoRA; the biases that train are the same ones."""
    name = {"bert": "query", "gpt2": "c_attn"}[kind]
    config = peft.LoraConfig(r=1, target_modules=[name], bias="all")
    want = twins.with_peft(twins.theirs(kind), config)
    names = {
        n.removeprefix("base_model.model.").replace(".base_layer", "")
        for n, p in want.named_parameters()
        if p.requires_grad and "lora_" not in n
    }
    model = twins.theirs(kind)
    bitfit.add(model, BitFitConfig())
    assert set(targets.trainable(model)) == names


def test_t5_has_no_bias():
    """Its table of positions has the word in its name, but is a weight; peft sees it alike."""
    config = peft.LoraConfig(r=1, target_modules=["q"], bias="all")
    want = twins.with_peft(twins.theirs("t5"), config)
    assert all("lora_" in n for n, p in want.named_parameters() if p.requires_grad)
    for model in (twins.theirs("t5"), twins.ours("t5")):
        message = twins.refused(model, lambda model: bitfit.add(model, BitFitConfig()))
        assert "the model has no bias" in message


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.MultiheadAttention(8, 2), {"in_proj_bias", "out_proj.bias"}),
        (nn.LSTM(3, 4), {"bias_ih_l0", "bias_hh_l0"}),
    ],
)
def test_layers_of_pytorch_with_biases_of_other_names(module, names):
    bitfit.add(module)
    assert set(targets.trainable(module)) == names


@pytest.mark.parametrize(("config", "share"), [(BERT_BASE, 0.0009), (BERT_LARGE, 0.0008)])
def test_shares_of_the_paper(config, share):
    """0.09 % of BERT-base and 0.08 % of BERT-large."""
    with torch.device("meta"):
        model = BertModel(config)
    total = sum(p.numel() for p in model.parameters())
    bitfit.add(model, BitFitConfig())
    assert round(sum(targets.trainable(model).values()) / total, 4) == share


def test_half_of_them():
    """The paper's smaller choice: queries, and the first matrix of each feed-forward layer."""
    model = twins.ours("bert")
    bitfit.add(model, BitFitConfig(targets=("q_proj", "up_proj"), also_train=("classifier",)))
    assert targets.trainable(model) == {
        **{f"bert.blocks.{i}.attention.q_proj.bias": twins.D for i in range(2)},
        **{f"bert.blocks.{i}.ffn.up_proj.bias": twins.F for i in range(2)},
        "classifier.weight": 2 * twins.D,
        "classifier.bias": 2,
    }


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_learns_by_its_biases_alone_and_gives_the_base_back(kind):
    model = twins.ours(kind)
    before, base = twins.picture(model), twins.run(model, kind)
    bitfit.add(model, BitFitConfig())
    assert torch.equal(twins.run(model, kind), base)
    twins.gradients(model, kind)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    learned, want = targets.state(model), twins.run(model, kind)
    assert not torch.allclose(want, base)
    bitfit.remove(model)
    assert twins.same(twins.picture(model), before)
    bitfit.add(model, BitFitConfig())
    targets.load_state(model, learned)
    assert torch.equal(twins.run(model, kind), want)


def test_bad_input_is_refused(unchecked):
    config = BitFitConfig(targets=("query",))
    message = twins.refused(twins.ours("bert"), lambda model: bitfit.add(model, config))
    assert "no module is called query" in message
    config = BitFitConfig(targets=("token_embedding",))
    message = twins.refused(twins.ours("bert"), lambda model: bitfit.add(model, config))
    assert "token_embedding has no bias" in message
    with pytest.raises(ValueError, match="targets must hold names"):
        BitFitConfig(targets="q_proj")
    model = twins.ours("bert")
    bitfit.add(model, BitFitConfig())
    message = twins.refused(model, lambda model: bitfit.add(model, BitFitConfig()))
    assert "carries BitFit already" in message
