"""Tiny models of transformers under the peft library, for the tests of its methods."""

import copy
import warnings
from collections.abc import Callable

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from llm_anatomy.models import bert, gpt2, t5
from llm_anatomy.weights import Pretrained
from tests import parity

V, D, F, B, T = 19, 12, 20, 2, 5


def make_gpt2() -> GPT2LMHeadModel:
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": D, "n_inner": F, "n_positions": 9}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, bos_token_id=0, eos_token_id=0, **sizes, **drops)
    )


def make_bert() -> BertForSequenceClassification:
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": D}
    config = BertConfig(
        vocab_size=V, intermediate_size=F, max_position_embeddings=9, **sizes, **drops
    )
    return BertForSequenceClassification(config)


def make_t5() -> T5ForConditionalGeneration:
    sizes = {"num_layers": 2, "d_model": D, "num_heads": 3, "d_kv": 5, "d_ff": F}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=V, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    )


THEIRS = {"gpt2": make_gpt2, "bert": make_bert, "t5": make_t5}
OURS = {"gpt2": gpt2.GPT2, "bert": bert.BertForSequenceClassification, "t5": t5.T5}


def theirs(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model of transformers, every weight of which is drawn."""
    return parity.randomise(THEIRS[kind](), seed).to(dtype)


def ours(kind: str, dtype: torch.dtype = torch.float32) -> Pretrained:
    """Our model with the same weights."""
    return parity.twin(theirs(kind), OURS[kind]).to(dtype)


def tokens(kind: str) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    first = torch.randint(1, V, (B, T))
    return (first, torch.randint(1, V, (B, T - 2))) if kind == "t5" else (first,)


def run(model: nn.Module, kind: str) -> Tensor:
    """The logits of a model, whichever of them it is."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    given = tokens(kind)
    if isinstance(base, Pretrained):
        return base(*given)
    if kind == "t5":
        return model(input_ids=given[0], decoder_input_ids=given[1]).logits
    return model(input_ids=given[0]).logits


def with_peft(model: nn.Module, config: PeftConfig) -> PeftModel:
    """A copy of the model under peft, without the remarks that peft makes on Conv1D."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), config).eval()


def loaded_by_peft(model: nn.Module, folder) -> PeftModel:
    """A copy of the model with the adapter of this folder; every tensor finds its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def draw(model: nn.Module, seed: int = 1) -> None:
    """Draw everything that trains, for what starts at zero or one hides mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3)


def gradients(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """Gradients of a loss that every logit takes part in, by name."""
    logits = run(model, kind)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def picture(model: nn.Module):
    """All that a method must leave as it was."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        [(name, type(module)) for name, module in model.named_modules()],
    )


def same(got, want) -> bool:
    """Whether two pictures agree, bit for bit."""
    equal = all(torch.equal(tensor, want[0][name]) for name, tensor in got[0].items())
    return got[0].keys() == want[0].keys() and equal and got[1:] == want[1:]


def refused(model: nn.Module, action: Callable[[nn.Module], object]) -> str:
    """The message with which an action is refused, which must leave the model as it was."""
    before = picture(model)
    try:
        action(model)
    except ValueError as error:
        assert same(picture(model), before), "the model was changed"
        return str(error)
    raise AssertionError("it was accepted")
