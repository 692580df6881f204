"""The sources' claims on T5, prefix decoders and BART, executed. The ledger is claims.yml."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm_anatomy import masks, objectives
from llm_anatomy.models.t5 import FLAN_T5_BASE, T5, T5Config, T5DecoderBlock, T5EncoderBlock
from llm_anatomy.tiny_world.text_to_text import mixture
from llm_anatomy.tiny_world.words import vocabulary
from tests.claims import tiny

# --- text to text -----------------------------------------------------------------------------


def test_each_task_is_a_pair_of_texts() -> None:
    """C097, C102, C134: translation, sentiment, summary and question differ in words only."""
    pairs, words = mixture(200), vocabulary()
    tasks = {pair.source[0] for pair in pairs}
    assert tasks == {"translate", "sentiment", "summarize", "question"}
    for pair in pairs:
        assert pair.source[1] == ":"
        assert words.decode(words.encode(pair.target)) == list(pair.target)
    assert {pair.target for pair in pairs if pair.source[0] == "sentiment"} == {
        ("positive",),
        ("negative",),
    }
    source, keep = words.batch([pair.source for pair in pairs])
    target, real = words.batch([pair.target for pair in pairs])
    labels = target.masked_fill(~real, -100)
    model = T5(T5Config(vocab_size=len(words), n_encoder_layers=1, n_decoder_layers=1, d_model=8,
                        n_heads=2, d_head=4, d_ff=8)).eval()  # fmt: skip
    logits = model(source, model.target_of(labels), keep)  # all tasks in one batch, one output
    assert logits.shape == (*labels.shape, len(words))
    assert objectives.cross_entropy(logits, labels).isfinite()


V, END, N = 12, 1, 3
REVERSE, CLASSIFY, LAST = 2, 3, 4  # the prefixes of three tasks on the same digits, 5 to 11


def task_batch(seed: int, B: int = 48) -> tuple[Tensor, Tensor]:
    """Three digits behind the prefix of a task, and what the task asks for."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(5, V, (B, N), generator=generator)
    task = torch.randint(REVERSE, LAST + 1, (B, 1), generator=generator)
    end = torch.full((B, 1), END)
    blank = torch.full((B, N - 1), -100)
    reverse = torch.cat((digits.flip(1), end), dim=1)
    small = torch.where(digits[:, :1] < 8, 5, 6)  # a class as a word
    classify = torch.cat((small, end, blank), dim=1)
    last = torch.cat((digits[:, -1:], end, blank), dim=1)
    labels = torch.where(task == REVERSE, reverse, torch.where(task == CLASSIFY, classify, last))
    return torch.cat((task, digits), dim=1), labels


@pytest.fixture(scope="module")
def multi_task_model() -> T5:
    torch.manual_seed(0)
    model = T5(T5Config(vocab_size=V, n_encoder_layers=1, n_decoder_layers=1, n_heads=4, d_model=32,
                        d_head=8, d_ff=64, gated=True, tied=False, dropout=0.0))  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    for step in range(300):
        source, labels = task_batch(step)
        loss = objectives.cross_entropy(model(source, model.target_of(labels)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def written(model: T5, source: Tensor, n: int) -> Tensor:
    tokens = torch.zeros(len(source), 1, dtype=torch.long)
    with torch.no_grad():
        memory = model.encode(source)
        for _ in range(n):
            best = model.decode(tokens, memory)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, best), dim=1)
    return tokens[:, 1:]


def test_one_model_does_several_tasks_told_apart_by_a_prefix(multi_task_model: T5) -> None:
    """C097, C098, C134: the prefix says whether one set of weights reverses or classifies."""
    source, labels = task_batch(10**6, B=300)
    right = ((written(multi_task_model, source, N + 1) == labels) | (labels == -100)).all(dim=1)
    for task in (REVERSE, CLASSIFY, LAST):
        assert right[source[:, 0] == task].double().mean() > 0.97
    other = source.clone()
    other[:, 0] = torch.where(source[:, 0] == REVERSE, LAST, REVERSE)  # the same text, another task
    change = written(multi_task_model, other, N + 1) != written(multi_task_model, source, N + 1)
    assert change.any(dim=1).double().mean() > 0.8


def test_pre_training_is_span_corruption_and_needs_no_task() -> None:
    """C101: input and target are cut from one text without labels, and together they restore it."""
    text = list(range(100, 220))
    sentinels = list(range(1000, 1020))
    for seed in range(20):
        spans = objectives.random_spans(len(text), torch.Generator().manual_seed(seed))
        source, target = objectives.corrupt_spans(text, spans, sentinels, END)
        assert objectives.restore_spans(source, target, sentinels) == text
        assert set(source) | set(target) <= {*text, *sentinels, END}
        assert len(target) < len(text) / 4


def test_one_loss_serves_pre_training_and_each_task(multi_task_model: T5) -> None:
    """C098, C101: a translation and a corrupted text go through the same loss, call for call."""
    source, labels = task_batch(1, B=4)
    corrupted, target = objectives.corrupt_spans([5, 6, 7, 8, 9], [(1, 3)], [2, 3], END)
    for x, y in ((source, labels), (torch.tensor([corrupted]), torch.tensor([target]))):
        logits = multi_task_model(x, multi_task_model.target_of(y))
        assert objectives.cross_entropy(logits, y).isfinite()


# --- the architecture -------------------------------------------------------------------------


def test_t5_is_an_encoder_decoder_without_biases() -> None:
    """C100, C126: two stacks, cross-attention in the second; no bias, no mean, a table each."""
    model = tiny.t5()
    assert model.config.is_encoder_decoder
    assert len(tiny.cross_attentions(model.encoder)) == 0
    assert len(tiny.cross_attentions(model.decoder)) == tiny.LAYERS
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if name.endswith(".bias")]
    tables = [name for name in names if "relative_attention_bias" in name]
    assert len(tables) == 2
    assert all("block.0.layer.0.SelfAttention" in name for name in tables)
    norm, x = model.encoder.final_layer_norm, torch.randn(3, tiny.WIDTH)
    shifted = norm(x + 1) - norm(x)
    assert shifted.abs().max() > 0.01  # layer norm would not see the shift
    torch.testing.assert_close(
        norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    )


def test_flan_t5_bart_and_marian_are_encoder_decoders() -> None:
    """C126: Flan-T5 is T5 1.1, BART and the Transformer have two stacks as well."""
    assert FLAN_T5_BASE.gated
    assert not FLAN_T5_BASE.tied
    assert len(tiny.cross_attentions(tiny.bart())) == tiny.LAYERS
    for config in (transformers.T5Config(), transformers.BartConfig(), transformers.MarianConfig()):
        assert config.is_encoder_decoder


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_the_default_of_generate_is_twenty_tokens() -> None:
    """C103: the snippet as printed stops after 20 new tokens, whatever the sentence needs."""
    model = tiny.t5()
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0.0  # never the best of random scores
        model.generation_config.eos_token_id = None
    out = model.generate(tiny.tokens(), do_sample=False)
    assert out.shape == (1, 21)  # the start token and twenty more
    longer = model.generate(tiny.tokens(), do_sample=False, max_new_tokens=40)
    assert longer.shape == (1, 41)


def test_a_t5_tokenizer_without_its_file_knows_no_words() -> None:
    """C103: made without a vocabulary it has 104 special tokens, and every word is unknown."""
    tokenizer = transformers.T5Tokenizer()
    assert len(tokenizer) == 104
    ids = tokenizer("translate English to German").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert set(tokens) == {"▁", tokenizer.unk_token, tokenizer.eos_token}


# --- encoder-decoder and prefix decoder ---------------------------------------------------------

S, T = 5, 3


def influence(read: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Which output position (row) changes with which token (column)."""
    before = read(ids)
    return torch.stack(
        [tiny.moved(before, read(tiny.changed(ids, s))) for s in range(ids.shape[1])], dim=1
    )


def prefix_llama(ids: Tensor) -> Tensor:
    """A decoder of one stack under a prefix mask."""
    allowed = masks.prefix(torch.tensor([S]), ids.shape[1])
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return tiny.llama()(ids, attention_mask=bias).last_hidden_state


def test_a_prefix_decoder_sees_its_input_both_ways_and_its_output_one_way() -> None:
    """C116: an input token reaches all positions, an output token only those from it on."""
    ids = tiny.tokens(length=S + T)
    expected = masks.prefix(torch.tensor([S]), S + T)[0, 0]
    assert torch.equal(influence(prefix_llama, ids), expected)
    assert tiny.cross_attentions(tiny.llama()) == []


def test_an_encoder_decoder_looks_both_ways_and_then_one_way() -> None:
    """C125, C127: put together, its influences are those of the prefix decoder."""
    model, ids = tiny.t5(), tiny.tokens(length=S + T)

    def read(x: Tensor) -> Tensor:
        source, target = x[:, :S], x[:, S:]
        memory = model.encoder(source).last_hidden_state
        # Drop the vocabulary: what the decoder's last layer holds has the encoder's width.
        states = model.decoder(target, encoder_hidden_states=memory).last_hidden_state
        return torch.cat((memory, states), dim=1)

    expected = masks.prefix(torch.tensor([S]), S + T)[0, 0]
    assert torch.equal(influence(read, ids), expected)
    assert len(tiny.cross_attentions(model)) == tiny.LAYERS


def weights(parts: list[nn.Module]) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


def test_same_pairs_but_twice_the_weights_for_about_the_same_work() -> None:
    """C127: L + L layers hold 2.3 times the weights of L layers and do 1.2 times their work."""
    config = T5Config(vocab_size=9, n_heads=4, d_model=64, d_head=16, d_ff=256, dropout=0.0)
    encoder, decoder = T5EncoderBlock(config), T5DecoderBlock(config)
    n = 8
    x, bias = torch.randn(1, n, 64), torch.zeros(1, 4, n, n)
    both, long_bias = torch.randn(1, 2 * n, 64), torch.zeros(1, 4, 2 * n, 2 * n)
    with FlopCounterMode(display=False) as apart:
        decoder(x, encoder(x, bias), bias, masks.causal(n))
    with FlopCounterMode(display=False) as joined:
        encoder(both, long_bias)  # a mask would change no product
    share = weights([encoder, decoder]) / weights([encoder])
    work = apart.get_total_flops() / joined.get_total_flops()
    assert 2.3 < share < 2.4
    assert 1.1 < work < 1.2


def test_sequence_to_sequence_models_write_autoregressively() -> None:
    """C001: the decoders of T5 and BART are autoregressive, and BART repairs damaged text."""
    ids = tiny.tokens(length=6)
    t5, bart = tiny.t5(), tiny.bart()
    causal = masks.causal(6)[0, 0]
    assert torch.equal(influence(lambda x: t5(ids, decoder_input_ids=x).logits, ids), causal)
    reads = influence(lambda x: bart(ids, decoder_input_ids=x).last_hidden_state, ids)
    assert torch.equal(reads, causal)
    text = list(range(20))
    damaged = objectives.infill_text(text, -1, torch.Generator().manual_seed(0))
    assert damaged != text
