"""The bouts: our models and attention beside those of transformers and PyTorch, same weights."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.measure import Bout, Work, flops
from llm_anatomy import masks
from llm_anatomy.attention import MultiHeadAttention, scaled_dot_product_attention
from llm_anatomy.decoding import Cached, generate, lay_lengthwise
from llm_anatomy.models.bert import BertForMaskedLM
from llm_anatomy.models.gpt2 import GPT2
from llm_anatomy.models.llama import Llama
from llm_anatomy.models.t5 import T5
from llm_anatomy.models.transformer import Transformer
from llm_anatomy.weights import Pretrained

Peers = dict[str, PreTrainedModel]


@dataclass(frozen=True)
class Shape:
    """Sizes of one model."""

    d_model: int
    d_ff: int
    n_heads: int
    n_layers: int


@dataclass(frozen=True)
class Sizes:
    """Shapes of GPT-2, LLaMA and BERT (`base`), of T5 and the Transformer (`small`), and of input.

    Vocabularies are cut at `most_tokens`.
    """

    base: Shape = Shape(768, 3072, 12, 12)
    small: Shape = Shape(512, 2048, 8, 6)
    most_tokens: int = 1_000_000
    length: int = 128
    prompt: int = 16
    new_tokens: int = 64


TINY = Sizes(Shape(32, 64, 4, 2), Shape(24, 40, 3, 2), 101, 16, 3, 4)


# --- Twins ---------------------------------------------------------------------------------------


def twins(peer: PreTrainedModel, ours: type[Pretrained]) -> tuple[Pretrained, Peers]:
    """Our model with the peer's weights, and the peer with each of its attentions.

    The peers share their weights: all is copied but the parameters.
    """
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model = ours.from_pretrained(folder)
    peers = {}
    for attention in ("eager", "sdpa"):
        peers[attention] = copy.deepcopy(peer.eval(), {id(p): p for p in peer.parameters()})
        peers[attention].set_attn_implementation(attention)
    return model, peers


@lru_cache(maxsize=1)  # one model at a time is held
def model_and_peers(name: str, sizes: Sizes) -> tuple[Pretrained, Peers]:
    """Make the twins of one name, with random weights and without dropout."""
    torch.manual_seed(0)
    build = {
        "GPT-2": _gpt2,
        "LLaMA": _llama,
        "BERT": _bert,
        "T5": _t5,
        "Transformer": _transformer,
    }[name]
    return twins(*build(sizes))


def _gpt2(sizes: Sizes) -> tuple[PreTrainedModel, type[Pretrained]]:
    base = sizes.base
    config = transformers.GPT2Config(
        vocab_size=min(50_257, sizes.most_tokens),
        n_embd=base.d_model,
        n_inner=base.d_ff,
        n_head=base.n_heads,
        n_layer=base.n_layers,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config), GPT2


def _llama(sizes: Sizes) -> tuple[PreTrainedModel, type[Pretrained]]:
    """LLaMA's layers at the width and depth of GPT-2; four query heads share keys and values."""
    base = sizes.base
    config = transformers.LlamaConfig(
        vocab_size=min(32_000, sizes.most_tokens),
        hidden_size=base.d_model,
        intermediate_size=2 * base.d_ff // 3,  # three matrices in place of two
        num_attention_heads=base.n_heads,
        num_key_value_heads=base.n_heads // 4,
        num_hidden_layers=base.n_layers,
    )
    return transformers.LlamaForCausalLM(config), Llama


def _bert(sizes: Sizes) -> tuple[PreTrainedModel, type[Pretrained]]:
    base = sizes.base
    config = transformers.BertConfig(
        vocab_size=min(30_522, sizes.most_tokens),
        hidden_size=base.d_model,
        intermediate_size=base.d_ff,
        num_attention_heads=base.n_heads,
        num_hidden_layers=base.n_layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config), BertForMaskedLM


def _t5(sizes: Sizes) -> tuple[PreTrainedModel, type[Pretrained]]:
    small = sizes.small
    config = transformers.T5Config(
        vocab_size=min(32_128, sizes.most_tokens),
        d_model=small.d_model,
        d_kv=small.d_model // small.n_heads,
        d_ff=small.d_ff,
        num_heads=small.n_heads,
        num_layers=small.n_layers,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config), T5


def _transformer(sizes: Sizes) -> tuple[PreTrainedModel, type[Pretrained]]:
    small, vocab_size = sizes.small, min(8000, sizes.most_tokens)
    config = transformers.MarianConfig(
        vocab_size=vocab_size,
        decoder_vocab_size=vocab_size,
        d_model=small.d_model,
        encoder_layers=small.n_layers,
        decoder_layers=small.n_layers,
        encoder_attention_heads=small.n_heads,
        decoder_attention_heads=small.n_heads,
        encoder_ffn_dim=small.d_ff,
        decoder_ffn_dim=small.d_ff,
        max_position_embeddings=4 * sizes.length,
        activation_function="relu",
        scale_embedding=True,
        dropout=0.0,
        pad_token_id=vocab_size - 1,
        decoder_start_token_id=vocab_size - 1,
        eos_token_id=0,
        forced_eos_token_id=None,
    )
    return transformers.MarianMTModel(config), Transformer


def text(model: Pretrained, length: int, seed: int = 1) -> Tensor:
    """Random tokens, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size - 1, (1, length), generator=generator)


# --- Forward and training ------------------------------------------------------------------------


def arithmetic(ours: Work, peers: dict[str, Work], *, training: bool = False) -> Bout:
    """A bout that products limit, without gradients unless it is one of training."""
    amount = flops(ours)
    if training:
        return Bout(ours, peers, "multiplying", amount)
    quick = {kind: torch.inference_mode()(work) for kind, work in peers.items()}
    return Bout(torch.inference_mode()(ours), quick, "multiplying", amount)


def logits_of(name: str, sizes: Sizes) -> tuple[Tensor, Pretrained, Work, dict[str, Work]]:
    """Targets for a loss, our model, and one forward pass of both sides."""
    ours, peers = model_and_peers(name, sizes)
    tokens, target = text(ours, sizes.length), text(ours, sizes.length, seed=2)
    if name in ("T5", "Transformer"):
        arguments = {"input_ids": tokens, "decoder_input_ids": target, "use_cache": False}
        our_pass = partial(ours, tokens, target)
    else:
        arguments = {"input_ids": tokens} | ({} if name == "BERT" else {"use_cache": False})
        our_pass = partial(ours, tokens)

    def their_pass(peer: PreTrainedModel) -> Tensor:
        return peer(**arguments).logits

    return target, ours, our_pass, {kind: partial(their_pass, p) for kind, p in peers.items()}


def forward(name: str, sizes: Sizes) -> Bout:
    _, _, ours, peers = logits_of(name, sizes)
    return arithmetic(ours, peers)


def training_step(name: str, sizes: Sizes) -> Bout:
    """Loss, gradients, clipping and AdamW at a rate of 0, so that every step sees one model."""
    target, ours, our_pass, passes = logits_of(name, sizes)
    _, peers = model_and_peers(name, sizes)

    def step(model: nn.Module, logits: Work) -> Work:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

        def work() -> tuple[Tensor, Tensor]:
            loss = F.cross_entropy(logits().flatten(0, 1), target.flatten())
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach(), norm

        return work

    steps = {kind: step(peer, passes[kind]) for kind, peer in peers.items()}
    return arithmetic(step(ours, our_pass), steps, training=True)


# --- Prefill, encoding and decoding --------------------------------------------------------------


def prefill(name: str, sizes: Sizes) -> Bout:
    """Read a text into the caches, for the scores of the token after it."""
    ours, peers = model_and_peers(name, sizes)
    tokens = text(ours, sizes.length)

    def our_work() -> Tensor:
        return last_logits(ours)(tokens, ours.new_caches(sizes.length))

    def their_work(peer: PreTrainedModel) -> Tensor:
        return peer(input_ids=tokens, use_cache=True, logits_to_keep=1).logits

    return arithmetic(our_work, {kind: partial(their_work, p) for kind, p in peers.items()})


def encode(name: str, sizes: Sizes) -> Bout:
    ours, peers = model_and_peers(name, sizes)
    source = text(ours, sizes.length)

    def their_work(peer: PreTrainedModel) -> Tensor:
        return peer.get_encoder()(source).last_hidden_state

    theirs = {kind: partial(their_work, peer) for kind, peer in peers.items()}
    return arithmetic(partial(ours.encode, source), theirs)


def last_logits(model: Pretrained, memory: Tensor | None = None) -> Callable[..., Tensor]:
    """Logits of the last position alone, as `decoding.Cached` asks for them."""

    def logits(tokens: Tensor, caches: list) -> Tensor:
        if memory is None:
            where = {"offset": len(caches[0])} if isinstance(model, GPT2) else {}
            x = model.hidden(model.embed(tokens, **where), caches=caches)
        else:
            x = model.hidden(tokens, memory, caches=caches)
        return model.logits(x[:, -1:])

    return logits


def decode(name: str, sizes: Sizes, *, lengthwise: bool = False) -> Bout:
    """Greedy decoding with a cache; the peer without the extras of its `generate`."""
    ours, peers = model_and_peers(name, sizes)
    if lengthwise:
        lay_lengthwise(ours)
    n, read = sizes.new_tokens, weights_read(ours)
    if name in ("GPT-2", "LLaMA"):
        prompt, memory, given = text(ours, sizes.prompt), None, {"logits_to_keep": 1}
    else:
        prompt = torch.tensor([[ours.config.pad_id]])
        with torch.no_grad():
            memory = ours.encode(text(ours, sizes.length))
        given = {"encoder_outputs": BaseModelOutput(last_hidden_state=memory)}

    def our_work() -> Tensor:
        caches = ours.new_caches(prompt.shape[1] + n)
        return generate(Cached(last_logits(ours, memory), caches), prompt, n)

    @torch.inference_mode()
    def their_work(peer: PreTrainedModel) -> Tensor:
        argument = "input_ids" if memory is None else "decoder_input_ids"
        found, past = [prompt], None
        for _ in range(n):
            out = peer(**{argument: found[-1]}, past_key_values=past, use_cache=True, **given)
            past = out.past_key_values
            found.append(out.logits[:, -1:].argmax(dim=-1))
        return torch.cat(found, dim=1)

    theirs = {kind: partial(their_work, peer) for kind, peer in peers.items()}
    return Bout(our_work, theirs, "reading", n * read)


def weights_read(model: Pretrained) -> float:
    """Bytes of weights that each new token needs.

    The embedding is the output layer, but LLaMA has one of its own. Keys and values of a memory are
    made once, for all tokens.
    """
    layers = model.decoder if isinstance(model, T5 | Transformer) else model.blocks
    once = ("cross_attention.k_proj", "cross_attention.v_proj")
    read = [p for name, p in layers.named_parameters() if not any(w in name for w in once)]
    read.append(model.lm_head.weight if isinstance(model, Llama) else model.token_embedding.weight)
    return float(sum(p.numel() * p.element_size() for p in read))


# --- Attention alone -----------------------------------------------------------------------------


def multi_head(sizes: Sizes) -> Bout:
    """Our module beside PyTorch's."""
    D, H, T = sizes.small.d_model, sizes.small.n_heads, sizes.length
    ours = MultiHeadAttention(D, H).eval()
    peer = nn.MultiheadAttention(D, H, batch_first=True).eval()
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    state = {
        "in_proj_weight": torch.cat([part.weight for part in parts]),
        "in_proj_bias": torch.cat([part.bias for part in parts]),
        "out_proj.weight": ours.o_proj.weight,
        "out_proj.bias": ours.o_proj.bias,
    }
    peer.load_state_dict(state)
    x, mask = torch.randn(4, T, D), masks.causal(T)
    hidden = ~mask[0, 0]
    return arithmetic(
        lambda: ours(x, mask=mask),
        {"nn's": lambda: peer(x, x, x, attn_mask=hidden, need_weights=False)[0]},
    )


def taught(sizes: Sizes) -> Bout:
    """The attention that the course derives beside the fused kernel that the models use."""
    H, T, E = sizes.small.n_heads, sizes.length, sizes.small.d_model // sizes.small.n_heads
    q, k, v = (torch.randn(4, H, T, E) for _ in range(3))
    mask = masks.causal(T)
    return arithmetic(
        lambda: scaled_dot_product_attention(q, k, v, mask)[0],
        {"fused kernel": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)},
    )


def rows() -> dict[str, Callable[[Sizes], Bout]]:
    """Every row, in the order in which they are measured."""

    def of(name: str, *makers: Callable[..., Bout]) -> dict[str, Callable[[Sizes], Bout]]:
        return {f"{name} {make.__name__.replace('_', ' ')}": partial(make, name) for make in makers}

    def lengthwise(name: str) -> dict[str, Callable[[Sizes], Bout]]:
        return {f"{name} decode, lengthwise": partial(decode, name, lengthwise=True)}

    return {
        **of("GPT-2", forward, prefill, decode, training_step),
        **lengthwise("GPT-2"),
        **of("LLaMA", forward, prefill, decode, training_step),
        **lengthwise("LLaMA"),
        **of("BERT", forward),
        **of("T5", encode, decode),
        **lengthwise("T5"),
        **of("Transformer", forward, decode, training_step),
        **lengthwise("Transformer"),
        "MultiHeadAttention": multi_head,
        "taught attention": taught,
    }
