"""The real architectures at toy size, every parameter random.

Default initialisation hides things: zero biases, unit gains and weights of 0.02 make most paths
through a network silent. Here every parameter is drawn from N(0, 0.3²), so whatever can have an
effect has one.
"""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

VOCAB = 40
WIDTH = 32
LAYERS = 2
HEADS = 4


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(batch: int = 1, length: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (batch, length), generator=generator)


def changed(ids: Tensor, position: int) -> Tensor:
    """The same tokens with another one at `position`."""
    other = ids.clone()
    other[:, position] = 5 + (other[:, position] - 5 + 1) % (VOCAB - 5)
    return other


def moved(a: Tensor, b: Tensor) -> Tensor:
    """Per position of the first sequence: did its vector change at all? (T,) of bool."""
    return (a != b).any(-1)[0]


def kwargs_bert() -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }


def kwargs_gpt2() -> dict:
    return {
        "vocab_size": VOCAB,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }


def kwargs_t5() -> dict:
    return {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "d_kv": WIDTH // HEADS,
        "d_ff": 2 * WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def kwargs_llama() -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "attn_implementation": "eager",
    }


def kwargs_bart() -> dict:
    return {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * WIDTH,
        "decoder_ffn_dim": 2 * WIDTH,
        "max_position_embeddings": 64,
    }


def bert() -> transformers.BertModel:
    return randomise(transformers.BertModel(transformers.BertConfig(**kwargs_bert())))


def gpt2() -> transformers.GPT2LMHeadModel:
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**kwargs_gpt2())))


def llama() -> transformers.LlamaModel:
    return randomise(transformers.LlamaModel(transformers.LlamaConfig(**kwargs_llama())))


def t5() -> transformers.T5ForConditionalGeneration:
    config = transformers.T5Config(**kwargs_t5())
    return randomise(transformers.T5ForConditionalGeneration(config))


def bart() -> transformers.BartModel:
    return randomise(transformers.BartModel(transformers.BartConfig(**kwargs_bart())))


def cross_attentions(model: nn.Module) -> list[str]:
    """Names of the sub-modules that read another sequence than their own."""
    names = ("crossattention", "encoder_attn", "EncDecAttention", "multihead_attn")
    return [name for name, _ in model.named_modules() if name.split(".")[-1] in names]


def count_calls(module: nn.Module, run: Callable[[], object]) -> int:
    """How often `run` calls the module's forward."""
    calls = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        run()
    finally:
        handle.remove()
    return len(calls)
