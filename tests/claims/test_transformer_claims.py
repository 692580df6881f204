"""The sources' claims on the Transformer, executed. The ledger is claims.yml."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from pybtex.database import parse_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.claims import tiny

# --- who, and when ------------------------------------------------------------------------------


def test_the_paper_and_its_year() -> None:
    """C059: the paper that every chapter cites, as the bibliography has it."""
    path = Path(__file__).resolve().parents[2] / "references.bib"
    entry = parse_file(str(path)).entries["vaswani2017attention"]
    assert entry.fields["title"] == "Attention Is All You Need"
    assert entry.fields["year"] == "2017"
    assert str(entry.persons["author"][0]) == "Vaswani, Ashish"


# --- which models have what -----------------------------------------------------------------------


def test_a_language_model_without_attention() -> None:
    """C006, C289: Mamba is an autoregressive language model and holds no attention at all."""
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.WIDTH, num_hidden_layers=2, state_size=4
    )
    model = tiny.randomise(transformers.MambaForCausalLM(config))
    assert not [name for name, _ in model.named_modules() if "att" in name.lower()]
    ids = tiny.tokens()
    before, after = model(ids).logits, model(tiny.changed(ids, 5)).logits
    assert before.shape == (1, 8, tiny.VOCAB)
    assert torch.equal(tiny.moved(before, after), torch.arange(8) >= 5)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)


def test_only_encoder_decoders_have_cross_attention() -> None:
    """C007, C067, C072, C110, C113, C146: BERT, GPT and LLaMA have one stack, T5 and BART two."""
    assert tiny.cross_attentions(tiny.bert()) == []
    assert tiny.cross_attentions(tiny.gpt2()) == []
    assert tiny.cross_attentions(tiny.llama()) == []
    assert len(tiny.cross_attentions(tiny.t5())) == tiny.LAYERS
    assert len(tiny.cross_attentions(tiny.bart())) == tiny.LAYERS


def test_which_way_each_family_looks() -> None:
    """C007: the encoder sees both sides, the decoder the left one; an encoder-decoder has both."""
    ids = tiny.tokens()
    everywhere, from_five = torch.ones(8, dtype=torch.bool), torch.arange(8) >= 5

    def reached(read: Callable[[Tensor], Tensor]) -> Tensor:
        return tiny.moved(read(ids), read(tiny.changed(ids, 5)))

    bert, gpt2, t5 = tiny.bert(), tiny.gpt2(), tiny.t5()
    assert torch.equal(reached(lambda x: bert(x).last_hidden_state), everywhere)
    assert torch.equal(reached(lambda x: gpt2(x).logits), from_five)
    assert torch.equal(reached(lambda x: t5.encoder(x).last_hidden_state), everywhere)
    assert torch.equal(reached(lambda x: t5(ids, decoder_input_ids=x).logits), from_five)


def test_encoder_decoder_maps_one_sequence_to_another() -> None:
    """C051, C221: input of one length, output of another; the output depends on all the input."""
    model = tiny.t5()
    source, target = tiny.tokens(length=7), tiny.tokens(length=5, seed=1)
    memory = model.encoder(source)
    assert memory.last_hidden_state.shape == (1, 7, tiny.WIDTH)
    logits = model(encoder_outputs=memory, decoder_input_ids=target).logits
    assert logits.shape == (1, 5, tiny.VOCAB)
    torch.testing.assert_close(logits, model(source, decoder_input_ids=target).logits)
    for position in range(7):
        other = model(tiny.changed(source, position), decoder_input_ids=target).logits
        assert tiny.moved(logits, other).all()


@pytest.mark.parametrize("task", ["copy", "reverse"])
def test_encoder_decoder_learns_a_transduction(task: str) -> None:
    """C051: a two-layer Transformer learns to copy and to reverse what the encoder reads."""
    torch.manual_seed(0)
    V, S, start, D = 6, 4, 6, 32
    model = nn.Transformer(D, 4, 1, 1, 64, dropout=0.0, batch_first=True)
    embed, place, head = nn.Embedding(V + 1, D), nn.Embedding(S, D), nn.Linear(D, V)
    modules = nn.ModuleList([model, embed, place, head])
    optimiser = torch.optim.Adam(modules.parameters(), lr=3e-3)
    causal = nn.Transformer.generate_square_subsequent_mask(S)

    def accuracy_and_loss(batch: int) -> tuple[float, Tensor]:
        source = torch.randint(V, (batch, S))
        target = source.flip(1) if task == "reverse" else source
        shifted = torch.cat([torch.full((batch, 1), start), target[:, :-1]], 1)
        p = place.weight
        logits = head(model(embed(source) + p, embed(shifted) + p, tgt_mask=causal))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        return (logits.argmax(-1) == target).float().mean().item(), loss

    assert accuracy_and_loss(256)[0] < 0.4
    for _ in range(300):
        optimiser.zero_grad()
        accuracy_and_loss(64)[1].backward()
        optimiser.step()
    assert accuracy_and_loss(256)[0] > 0.9


def test_encoder_gives_each_token_a_vector_of_its_context() -> None:
    """C068: one vector per input token, and each depends on the token and on the whole input."""
    model, ids = tiny.t5().encoder, tiny.tokens()
    states = model(ids).last_hidden_state
    assert states.shape == (1, 8, tiny.WIDTH)
    for position in range(8):
        other = model(tiny.changed(ids, position)).last_hidden_state
        assert tiny.moved(states, other).all()


def test_decoder_reads_an_encoder_only_where_there_is_one() -> None:
    """C069: T5's logits depend on the encoder's output; GPT-2 refuses to be given one."""
    model, ids = tiny.t5(), tiny.tokens()
    memory = model.encoder(ids).last_hidden_state
    logits = model(encoder_outputs=(memory,), decoder_input_ids=ids).logits
    silent = model(encoder_outputs=(torch.zeros_like(memory),), decoder_input_ids=ids).logits
    assert tiny.moved(logits, silent).all()
    with pytest.raises(ValueError, match="cross"):
        tiny.gpt2()(ids, encoder_hidden_states=memory)


def test_lowest_level_is_static_and_every_layer_is_contextual() -> None:
    """C071: the embedding knows the word alone; from the first layer on the context is mixed in.

    What "more abstract" means is measured by probing trained models: see the cited work.
    """
    model, ids = tiny.bert(), tiny.tokens()
    before = model(ids, output_hidden_states=True).hidden_states
    after = model(tiny.changed(ids, 5), output_hidden_states=True).hidden_states
    assert torch.equal(tiny.moved(before[0], after[0]), torch.arange(8) == 5)
    for layer in range(1, tiny.LAYERS + 1):
        assert tiny.moved(before[layer], after[layer]).all()


def test_heads_for_both_tasks_on_both_kinds() -> None:
    """C290: an encoder classifies, a decoder models language, and a decoder can classify too."""
    ids = tiny.tokens(batch=3)
    labels = torch.tensor([0, 1, 2])
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(**tiny.kwargs_bert(), num_labels=3)
    )
    gpt2 = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(**tiny.kwargs_gpt2(), num_labels=3)
    )
    for model in (tiny.randomise(bert), tiny.randomise(gpt2)):
        output = model(ids, labels=labels)
        assert output.logits.shape == (3, 3)
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert tiny.gpt2()(ids).logits.shape == (3, 8, tiny.VOCAB)


# --- no recurrence, and what is parallel ----------------------------------------------------------


def test_no_recurrence_and_no_convolution() -> None:
    """C061, C182: the modules of a Transformer are linear maps, norms, embeddings, activations."""
    recurrent = (nn.RNNBase, nn.RNNCellBase)
    convolution = nn.modules.conv._ConvNd
    for model in (
        nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        tiny.bert(),
        tiny.gpt2(),
        tiny.t5(),
    ):
        kinds = [type(module) for module in model.modules()]
        assert not [kind for kind in kinds if issubclass(kind, (*recurrent, convolution))]
    # GPT-2's "Conv1D" is a linear map by another name.
    layer = tiny.gpt2().transformer.h[0].mlp.c_fc
    x = torch.randn(1, 3, tiny.WIDTH)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias)


def test_positions_do_not_wait_for_each_other() -> None:
    """C061, C182, C113: a layer's outputs can be computed in any order: none needs another."""
    layer = tiny.randomise(nn.MultiheadAttention(16, 2, batch_first=True).double())
    x = torch.randn(1, 6, 16).double()
    at_once = layer(x, x, x, need_weights=False)[0]
    for t in reversed(range(6)):
        alone = layer(x[:, [t]], x, x, need_weights=False)[0]
        torch.testing.assert_close(alone[:, 0], at_once[:, t])


def test_reading_is_one_step_and_writing_is_one_step_per_token() -> None:
    """C062, C113: one call scores all positions of a text; generating n tokens takes n calls."""
    model, ids = tiny.gpt2(), tiny.tokens(length=16)
    assert tiny.count_calls(model.transformer, lambda: model(ids)) == 1
    at_once = model(ids).logits
    one_by_one = torch.cat([model(ids[:, : t + 1]).logits[:, -1:] for t in range(16)], 1)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-4)
    for use_cache in (True, False):

        def generate(use_cache: bool = use_cache) -> Tensor:
            return model.generate(
                ids[:, :1], max_new_tokens=15, do_sample=False, use_cache=use_cache
            )

        assert generate().shape == (1, 16)
        assert tiny.count_calls(model.transformer, generate) == 15


# --- decoder-only ---------------------------------------------------------------------------------


def test_decoder_only_takes_the_prompt_itself() -> None:
    """C147: the prompt goes in as it is, [CLS] is BERT's, and a lone start token is for T5."""
    model, prompt = tiny.gpt2(), tiny.tokens(length=6)
    seen = []
    handle = model.transformer.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.generate(prompt, max_new_tokens=2, do_sample=False)
    handle.remove()
    assert torch.equal(seen[0], prompt)

    t5 = tiny.t5()
    seen = []
    handle = t5.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    t5.generate(prompt, max_new_tokens=2, do_sample=False)
    handle.remove()
    start = t5.config.decoder_start_token_id
    assert seen[0].tolist() == [[start]]
    assert start == t5.config.pad_token_id

    # The published defaults: GPT-2's one special token is <|endoftext|>, the last of 50 257.
    assert transformers.GPT2Config().bos_token_id == 50256
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    assert bert.cls_token == "[CLS]"
    assert bert("")["input_ids"] == [2, 3]


def test_encoder_decoders_generate_too() -> None:
    """C148, C152: T5 writes token by token as well, and its decoder is just as autoregressive."""
    model, source, target = tiny.t5(), tiny.tokens(), tiny.tokens(length=6, seed=1)
    written = model.generate(source, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    assert written.shape == (1, 6)
    logits = model(source, decoder_input_ids=target).logits
    other = model(source, decoder_input_ids=tiny.changed(target, 3)).logits
    assert torch.equal(tiny.moved(logits, other), torch.arange(6) >= 3)


def test_causal_history_is_reusable_and_bidirectional_is_not() -> None:
    """C148: when a text grows, a decoder-only model keeps all it computed; an encoder cannot."""
    ids = tiny.tokens(length=10)
    gpt2, bert = tiny.gpt2(), tiny.bert()
    torch.testing.assert_close(gpt2(ids).logits[:, :6], gpt2(ids[:, :6]).logits)
    grown, short = bert(ids).last_hidden_state[:, :6], bert(ids[:, :6]).last_hidden_state
    assert (grown - short).abs().amax(-1).min() > 1e-3


def test_every_token_of_a_decoder_bears_loss() -> None:
    """C148: a causal model learns from T-1 predictions of a text, masked modelling from 15 %."""
    model, ids = tiny.gpt2(), tiny.tokens(length=20)
    logits = model(ids).logits
    logits.retain_grad()
    nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    assert int((logits.grad[0].abs().sum(-1) > 0).sum()) == 19

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(5, 1000))]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, seed=0)
    rows = [{"input_ids": row} for row in torch.randint(5, 1000, (200, 100)).tolist()]
    share = (collate(rows)["labels"] != -100).float().mean().item()
    # 20 000 independent choices: six standard deviations are 0.015.
    assert share == pytest.approx(0.15, abs=0.015)


def parameters(model: nn.Module) -> int:
    """Weights of the blocks' linear maps: what a token is multiplied with (no embedding)."""
    blocks = [m for name, m in model.named_modules() if name.split(".")[-1] in ("layers", "h")]
    return sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)


def multiply_adds(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def stacks(n_decoder_only: int) -> tuple[nn.Module, nn.Module]:
    """A GPT-2 of n blocks beside a BART of 6 encoder and 6 decoder blocks of the same width."""
    D = 64
    gpt2 = transformers.GPT2Config(**{**tiny.kwargs_gpt2(), "n_embd": D, "n_layer": n_decoder_only})
    bart = transformers.BartConfig(
        **{
            **tiny.kwargs_bart(),
            "d_model": D,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_ffn_dim": 4 * D,
            "decoder_ffn_dim": 4 * D,
            "attn_implementation": "eager",
        }
    )
    return transformers.GPT2Model(gpt2).eval(), transformers.BartModel(bart).eval()


def test_which_is_cheaper_depends_on_what_is_held_equal() -> None:
    """C149, C150: equal parameters, equal depth per token: two comparisons, two answers.

    Blocks of width D hold 12 D² weights, 16 D² with cross-attention. Six plus six blocks are
    6·12 + 6·16 = 168 D² = fourteen decoder-only blocks. A source token passes the six encoder
    blocks and the keys and values of the cross-attentions (84 D²), a target token the rest of the
    decoder (84 D²): half of what each token of the fourteen blocks costs.
    """
    T = 16
    source, target = tiny.tokens(length=T), tiny.tokens(length=T, seed=1)
    both = torch.cat([source, target], 1)

    gpt2, bart = stacks(n_decoder_only=14)
    assert parameters(gpt2) == parameters(bart) == 168 * 64**2
    decoder_only = multiply_adds(lambda: gpt2(both))
    encoder_decoder = multiply_adds(lambda: bart(source, decoder_input_ids=target))
    # Attention's own products come on top, below a tenth at this length: 2·L·T/(12·L·D) per block.
    assert decoder_only / encoder_decoder == pytest.approx(2, rel=0.1)

    gpt2, _ = stacks(n_decoder_only=6)
    assert parameters(gpt2) / parameters(bart) == pytest.approx(72 / 168)
    decoder_only = multiply_adds(lambda: gpt2(both))
    assert decoder_only / encoder_decoder == pytest.approx(72 / 84, rel=0.1)


def test_decoder_only_is_one_block_with_fewer_parts() -> None:
    """C151: GPT-2 repeats one block of two sub-layers; T5 has two blocks, the second with three."""
    gpt2, t5 = tiny.gpt2(), tiny.t5()
    assert {type(block) for block in gpt2.transformer.h} == {type(gpt2.transformer.h[0])}
    assert len(children(gpt2.transformer.h[0], "attn", "mlp", "crossattention")) == 2
    assert len(t5.encoder.block[0].layer) == 2
    assert len(t5.decoder.block[0].layer) == 3


# --- blocks ---------------------------------------------------------------------------------------


def children(module: nn.Module, *names: str) -> list[str]:
    return [name for name, _ in module.named_children() if name in names]


def order_of_calls(
    model: nn.Module, modules: dict[str, nn.Module], *args: object, **kwargs
) -> list:
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in modules.items()
    ]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return called


def test_decoder_layer_has_three_sublayers_encoder_layer_two() -> None:
    """C188, C193, C194, C222: self-attention, cross-attention, feed-forward, in this order."""
    x, memory = torch.randn(1, 5, 16), torch.randn(1, 7, 16)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    names = ("self_attn", "multihead_attn", "linear1")
    parts = {name: getattr(encoder, name) for name in children(encoder, *names)}
    assert order_of_calls(encoder.train(), parts, x) == ["self_attn", "linear1"]
    assert len([m for m in encoder.children() if isinstance(m, nn.LayerNorm)]) == 2

    decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    parts = {name: getattr(decoder, name) for name in children(decoder, *names)}
    assert order_of_calls(decoder, parts, x, memory) == ["self_attn", "multihead_attn", "linear1"]
    assert len([m for m in decoder.children() if isinstance(m, nn.LayerNorm)]) == 3

    t5, ids = tiny.t5(), tiny.tokens()
    first = t5.decoder.block[0].layer
    assert [type(part).__name__ for part in first] == [
        "T5LayerSelfAttention",
        "T5LayerCrossAttention",
        "T5LayerFF",
    ]
    parts = {type(part).__name__: part for part in first}
    assert order_of_calls(t5, parts, ids, decoder_input_ids=ids) == list(parts)
    assert [type(part).__name__ for part in t5.encoder.block[0].layer] == [
        "T5LayerSelfAttention",
        "T5LayerFF",
    ]


def test_layers_are_alike_in_shape_and_not_in_weights() -> None:
    """C187: the stack repeats a structure (six and six in the base model), not its parameters."""
    with torch.device("meta"):
        base = nn.Transformer(batch_first=True)
    assert len(base.encoder.layers) == len(base.decoder.layers) == 6
    assert base.d_model == 512 and base.nhead == 8
    for stack in (
        tiny.t5().encoder.block[1:],
        tiny.bert().encoder.layer,
        tiny.gpt2().transformer.h,
    ):
        shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in stack]
        assert all(shape == shapes[0] for shape in shapes)
    first, second = tiny.gpt2().transformer.h
    assert not torch.equal(first.attn.c_attn.weight, second.attn.c_attn.weight)
    storage = {p.data_ptr() for p in first.parameters()} & {
        p.data_ptr() for p in second.parameters()
    }
    assert storage == set()


def record(modules: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, tuple]:
    """The first input and the output of each module during `run`."""
    seen: dict[str, tuple] = {}

    def hook(name: str) -> Callable:
        def keep(_: nn.Module, args: tuple, output: object) -> None:
            seen[name] = (args[0], output[0] if isinstance(output, tuple) else output)

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_norm_stands_around_sublayers_after_in_bert_before_in_gpt2() -> None:
    """C223: LayerNorm(x + Sublayer(x)) in BERT, x + Sublayer(LayerNorm(x)) in GPT-2."""
    model, ids = tiny.bert(), tiny.tokens()
    layer = model.encoder.layer[1]
    seen = record(
        {
            "block": layer,
            "attention": layer.attention.output.dense,
            "norm1": layer.attention.output.LayerNorm,
            "ffn": layer.output.dense,
            "norm2": layer.output.LayerNorm,
        },
        lambda: model(ids),
    )
    x = seen["block"][0]
    torch.testing.assert_close(seen["norm1"][0], x + seen["attention"][1])
    torch.testing.assert_close(seen["norm2"][0], seen["norm1"][1] + seen["ffn"][1])
    torch.testing.assert_close(seen["block"][1], seen["norm2"][1])

    model = tiny.gpt2()
    block = model.transformer.h[1]
    seen = record(
        {
            "block": block,
            "norm1": block.ln_1,
            "attention": block.attn,
            "norm2": block.ln_2,
            "ffn": block.mlp,
        },
        lambda: model(ids),
    )
    x = seen["block"][0]
    torch.testing.assert_close(seen["norm1"][0], x)
    torch.testing.assert_close(seen["norm2"][0], x + seen["attention"][1])
    torch.testing.assert_close(seen["block"][1], seen["norm2"][0] + seen["ffn"][1])


def feed_forwards() -> dict[str, nn.Module]:
    bert_layer = tiny.bert().encoder.layer[0]
    bert = nn.Sequential(bert_layer.intermediate, bert_layer.output.dense)
    return {
        "bert": bert.eval(),
        "gpt2": tiny.gpt2().transformer.h[0].mlp,
        "llama": tiny.llama().layers[0].mlp,
        "t5": tiny.t5().encoder.block[0].layer[1].DenseReluDense,
    }


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_feed_forward_works_on_each_position_alone(name: str) -> None:
    """C226, C193: the same function at every position, and no position sees another."""
    ffn = feed_forwards()[name].double()
    x = torch.randn(1, 6, tiny.WIDTH).double()
    y = ffn(x)
    for t in range(6):
        torch.testing.assert_close(ffn(x[:, [t]]), y[:, [t]])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(ffn(x[:, order]), y[:, order])


@pytest.mark.parametrize(("name", "n"), [("bert", 2), ("gpt2", 2), ("t5", 2), ("llama", 3)])
def test_feed_forward_is_linear_maps_and_a_nonlinearity(name: str, n: int) -> None:
    """C335, C193: two linear maps (three where gated) with an activation that is not linear."""
    ffn = feed_forwards()[name].double()
    assert len([p for p in ffn.parameters() if p.ndim == 2]) == n
    x, y = torch.randn(2, 1, 6, tiny.WIDTH).double()
    zero = ffn(torch.zeros_like(x))
    # A stack of linear maps is affine: f(x + y) - f(0) = (f(x) - f(0)) + (f(y) - f(0)).
    # Doubling would not tell: a ReLU without biases has f(2x) = 2 f(x) and is not linear.
    assert not torch.allclose(ffn(x + y) - zero, ffn(x) + ffn(y) - 2 * zero)


def test_blocks_of_the_families_have_the_same_two_parts() -> None:
    """C227, C327, C334: attention and feed-forward in each, norms and details vary."""
    blocks = {
        "bert": (tiny.bert().encoder.layer[0], "attention", "intermediate"),
        "gpt2": (tiny.gpt2().transformer.h[0], "attn", "mlp"),
        "llama": (tiny.llama().layers[0], "self_attn", "mlp"),
    }
    norms = set()
    for block, attention, ffn in blocks.values():
        assert children(block, attention, ffn) == [attention, ffn]
        kinds = [type(m).__name__ for m in block.modules() if "Norm" in type(m).__name__]
        # And two norms, one for each part: see C223 for where they stand.
        assert len(kinds) == 2
        norms.update(kinds)
    assert norms == {"LayerNorm", "LlamaRMSNorm"}
