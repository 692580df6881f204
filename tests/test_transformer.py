"""The Transformer against transformers' MarianMTModel and PyTorch's nn.Transformer."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from llm_anatomy import masks
from llm_anatomy.models.transformer import (
    TRANSFORMER_BASE,
    TRANSFORMER_BIG,
    PreNormTransformer,
    Transformer,
    TransformerConfig,
)
from llm_anatomy.weights import to_hf

B, S, T, V, PAD, START = 3, 7, 5, 29, 28, 28
SMALL = TransformerConfig(
    vocab_size=V,
    n_encoder_layers=2,
    n_decoder_layers=3,
    n_heads=4,
    d_model=24,
    d_ff=20,
    n_positions=32,
    interleaved=False,
    pad_id=PAD,
)


def randomise(model: nn.Module) -> nn.Module:
    """Draw every weight, also the bias of the logits: fresh weights are small and hide mistakes.

    The sinusoids are no weights: both sides compute them, and the tests compare the results. Gains
    of norms are drawn around 1, so that what is generated depends on what is read.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "positions" not in name:
            nn.init.normal_(tensor, mean=1.0 if "norm.weight" in name else 0.0, std=0.3)
    return model.eval()


def tiny_marian(activation: str = "relu", scale: bool = True) -> MarianMTModel:
    config = MarianConfig(
        vocab_size=V,
        decoder_vocab_size=V,
        d_model=24,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_position_embeddings=32,
        activation_function=activation,
        scale_embedding=scale,
        pad_token_id=PAD,
        decoder_start_token_id=START,
        eos_token_id=0,
        forced_eos_token_id=None,
    )
    return randomise(MarianMTModel(config))


@pytest.fixture(
    params=[("relu", True), ("swish", True), ("relu", False)],
    ids=["relu", "swish", "unscaled"],
)
def twins(request, tmp_path) -> tuple[MarianMTModel, Transformer]:
    theirs = tiny_marian(*request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, Transformer.from_pretrained(tmp_path)


@pytest.fixture
def source() -> Tensor:
    return torch.randint(1, PAD, (B, S))


@pytest.fixture
def target() -> Tensor:
    rest = torch.randint(1, PAD, (B, T - 1))
    return torch.cat((torch.full((B, 1), START), rest), dim=1)


@pytest.fixture
def keep() -> Tensor:
    return torch.arange(S) < torch.tensor([[S], [S - 3], [2]])


# --- Parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_marian_s(twins, source, target, keep, padded):
    theirs, ours = twins
    keep = keep if padded else None
    attention_mask = None if keep is None else keep.long()
    expected = theirs(
        input_ids=source, attention_mask=attention_mask, decoder_input_ids=target
    ).logits
    torch.testing.assert_close(ours(source, target, keep), expected)


def test_float64_logits_are_marian_s(twins, source, target, keep):
    theirs, ours = (model.double() for model in twins)
    for model in (theirs.model.encoder, theirs.model.decoder):  # the table is float32 in both
        torch.testing.assert_close(model.embed_positions.weight[:S], ours.positions[:S])
    expected = theirs(input_ids=source, attention_mask=keep.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours(source, target, keep), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, {}), (torch.float64, {"atol": 1e-9, "rtol": 1e-9})]
)
def test_loss_and_gradients_are_marian_s(twins, source, target, keep, padded, dtype, tolerance):
    theirs, ours = (model.to(dtype) for model in twins)
    keep = keep if padded else None
    attention_mask = None if keep is None else keep.long()
    labels = torch.cat((target[:, 1:], torch.zeros(B, 1, dtype=torch.long)), dim=1)
    labels[1, 3:] = -100
    their_loss = theirs(
        input_ids=source, attention_mask=attention_mask, decoder_input_ids=target, labels=labels
    ).loss
    our_loss = F.cross_entropy(ours(source, target, keep).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(our_loss, their_loss, **tolerance)

    their_loss.backward()
    our_loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    gradients["logits_bias"] = torch.zeros(V)  # a buffer: it has no gradient in either
    got = to_hf(gradients, Transformer.hf_rules(ours.config))
    del got["final_logits_bias"]
    want = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, want[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def test_dropout_is_where_marian_has_it(twins, source, target):
    """The same seed drops the same numbers in both, if both draw them in the same places."""
    theirs, ours = (model.train() for model in twins)
    torch.manual_seed(5)
    expected = theirs(input_ids=source, decoder_input_ids=target).logits
    torch.manual_seed(5)
    torch.testing.assert_close(ours(source, target), expected)


def test_vectors_in_place_of_tokens(twins, source, target, keep):
    """Marian scales the vectors that its decoder is given, but not those of its encoder."""
    theirs, ours = twins
    P, scale = 4, 24**0.5 if ours.config.scaled_embedding else 1.0
    prompt, written = torch.randn(B, P, 24, requires_grad=True), ours.token_embedding(target)
    keep = torch.cat((torch.ones(B, P, dtype=torch.bool), keep), dim=1)
    read = torch.cat((prompt, ours.token_embedding(source) * scale), dim=1)
    expected = theirs(
        inputs_embeds=read, attention_mask=keep.long(), decoder_inputs_embeds=written
    ).logits
    memory = ours.encoder_hidden(ours.place(read), keep)
    got = ours.logits(ours.decoder_hidden(ours.place(written * scale), memory, keep))
    torch.testing.assert_close(got, expected)
    (want,) = torch.autograd.grad(expected.square().mean(), prompt, retain_graph=True)
    got.square().mean().backward()
    assert prompt.grad.abs().amax(dim=(0, 2)).min() > 0
    torch.testing.assert_close(prompt.grad, want)


@torch.no_grad()
def test_each_side_composes_its_embedding_and_its_blocks(model, source, target, keep):
    memory = model.encode(source, keep)
    assert torch.equal(model.encoder_hidden(model.embed(source), keep), memory)
    states = model.decoder_hidden(model.embed(target), memory, keep)
    assert torch.equal(states, model.hidden(target, memory, keep))
    caches = model.new_caches()
    for t in range(T):
        placed = model.place(model.embed(target[:, [t]]) - model.positions[:1], t)
        part = model.decoder_hidden(placed, memory, keep, caches)
        torch.testing.assert_close(part[:, 0], states[:, t])


def greedy(
    model: Transformer, source: Tensor, keep: Tensor | None, n: int, capacity: int | None
) -> Tensor:
    """Write up to n tokens, of each row none twice; a capacity of 0 stands for no cache at all."""
    memory = model.encode(source, keep)
    caches = None if capacity == 0 else model.new_caches(capacity)
    tokens = torch.full((len(source), 1), START)
    over = torch.zeros(len(source), dtype=torch.bool)
    for _ in range(n):
        new = tokens if caches is None else tokens[:, -1:]
        logits = model.decode(new, memory, keep, caches)[:, -1]
        best = logits.scatter(1, tokens, -torch.inf).argmax(dim=-1)
        best = torch.where(over, PAD, best)
        over |= best == 0
        tokens = torch.cat((tokens, best[:, None]), dim=1)
        if over.all():
            break
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capacity", [0, None, 16], ids=["uncached", "growing", "fixed"])
def test_greedy_generation_is_marian_s_token_for_token(twins, source, keep, capacity, padded):
    """No token twice in a row of the batch: a random model would repeat its first one for ever."""
    theirs, ours = twins
    keep = keep if padded else None
    expected = theirs.generate(
        input_ids=source,
        attention_mask=torch.ones_like(source) if keep is None else keep.long(),
        generation_config=GenerationConfig(
            max_new_tokens=14,
            num_beams=1,
            do_sample=False,
            no_repeat_ngram_size=1,
            use_cache=capacity != 0,
            pad_token_id=PAD,
            eos_token_id=0,
            decoder_start_token_id=START,
        ),
    )
    assert expected.shape == (B, 15) and len(expected.unique()) > 14
    assert torch.equal(greedy(ours, source, keep, 14, capacity), expected)


def test_round_trip_is_exact_to_the_bit(twins, tmp_path):
    theirs, ours = twins
    ours.save_pretrained(tmp_path / "again")
    again, report = MarianMTModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    want, got = theirs.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_round_trip_through_marian_is_exact_to_the_bit(tmp_path):
    ours = randomise(Transformer(SMALL))
    ours.save_pretrained(tmp_path / "ours")
    MarianMTModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = Transformer.from_pretrained(tmp_path / "theirs")
    assert again.config == SMALL
    assert again.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_shards_of_transformers_are_read(tmp_path):
    theirs = tiny_marian()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    got = Transformer.from_pretrained(tmp_path)
    assert torch.equal(got.token_embedding.weight, theirs.model.shared.weight)
    for name, tensor in to_hf(got.state_dict(), Transformer.hf_rules(got.config)).items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [({"interleaved": True}, "interleaved=False"), ({"pad_id": None}, "need a pad_id")],
)
def test_what_marian_cannot_be_is_not_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Transformer(dataclasses.replace(SMALL, **change)).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("ours_class", "pre_norm"), [(Transformer, False), (PreNormTransformer, True)]
)
def test_stacks_are_torch_s(ours_class, pre_norm, source, target, keep, padded):
    """nn.Transformer has post-norm blocks, or pre-norm ones with norm_first."""
    ours = randomise(ours_class(SMALL))
    theirs = nn.Transformer(
        24, 4, 2, 3, 20, dropout=0.1, batch_first=True, norm_first=pre_norm
    ).eval()
    if not pre_norm:
        theirs.encoder.norm = theirs.decoder.norm = None  # the paper has no norm at the end
    names = {
        "attention_norm": "norm1",
        "ffn.up_proj": "linear1",
        "ffn.down_proj": "linear2",
        "attention.o_proj": "self_attn.out_proj",
        "cross_attention.o_proj": "multihead_attn.out_proj",
    }
    state = ours.state_dict()
    copied = {}
    for side, blocks in (("encoder", ours.encoder), ("decoder", ours.decoder)):
        last = {
            "encoder": {"ffn_norm": "norm2"},
            "decoder": {"cross_norm": "norm2", "ffn_norm": "norm3"},
        }
        for i, kind in itertools.product(range(len(blocks)), ("weight", "bias")):
            for our_name, their_name in (names | last[side]).items():
                if f"{side}.{i}.{our_name}.{kind}" in state:
                    copied[f"{side}.layers.{i}.{their_name}.{kind}"] = state[
                        f"{side}.{i}.{our_name}.{kind}"
                    ]
            for our_name, their_name in (
                ("attention", "self_attn"),
                ("cross_attention", "multihead_attn"),
            ):
                parts = [state.get(f"{side}.{i}.{our_name}.{p}_proj.{kind}") for p in "qkv"]
                if parts[0] is not None:
                    copied[f"{side}.layers.{i}.{their_name}.in_proj_{kind}"] = torch.cat(parts)
        if pre_norm:
            for kind in ("weight", "bias"):
                copied[f"{side}.norm.{kind}"] = state[f"{side}_norm.{kind}"]
    theirs.load_state_dict(copied)  # strict: every tensor of theirs is set

    keep = keep if padded else torch.ones(B, S, dtype=torch.bool)
    expected = theirs(
        ours.embed(source),
        ours.embed(target),
        tgt_mask=~masks.causal(T)[0, 0],
        src_key_padding_mask=~keep,
        memory_key_padding_mask=~keep,
    )
    actual = ours.hidden(target, ours.encode(source, keep), keep)
    torch.testing.assert_close(actual, expected)


# --- Invariants -----------------------------------------------------------------------------------


@pytest.fixture(params=[Transformer, PreNormTransformer])
def model(request) -> Transformer:
    return randomise(request.param(SMALL))


@torch.no_grad()
def test_no_position_sees_a_later_target(model, source, target):
    before = model(source, target)
    for t in range(1, T):
        changed = target.clone()
        changed[:, t] = (changed[:, t] + 1) % PAD
        after = model(source, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@torch.no_grad()
def test_padding_does_not_reach_anything(model, source, target, keep):
    before = model(source, target, keep)
    other = torch.where(keep, source, (source + 5) % PAD)
    assert torch.equal(model(other, target, keep), before)
    wider = torch.cat((source, torch.full((B, 4), PAD)), dim=1)
    keep_wider = torch.cat((keep, torch.zeros(B, 4, dtype=torch.bool)), dim=1)
    torch.testing.assert_close(model(wider, target, keep_wider), before)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1, 1, 1, 1, 1], [2, 3], [4, 1], [5]])
@pytest.mark.parametrize("capacity", [None, 5, 9])
def test_cached_decoding_equals_uncached(model, source, target, keep, pieces, capacity):
    memory, caches = model.encode(source, keep), model.new_caches(capacity)
    parts = [model.decode(part, memory, keep, caches) for part in target.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(source, target, keep))
    assert [len(own) for own, _ in caches] == [T] * 3
    assert [len(cross) for _, cross in caches] == [S] * 3


def test_every_parameter_gets_a_gradient(model, source, target, keep):
    model.double()(source, target, keep).square().sum().backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad.abs().max()
        # the bias of the keys adds one number to a whole row of scores: no softmax can see it
        assert moved < 1e-9 if name.endswith("k_proj.bias") else moved > 1e-3, name


def test_forward_is_encode_hidden_and_logits(model, source, target, keep):
    memory = model.encode(source, keep)
    composed = model.logits(model.hidden(target, memory, keep))
    assert torch.equal(composed, model(source, target, keep))


def test_dropout_acts_in_training_alone(model, source, target):
    assert torch.equal(model(source, target), model(source, target))
    trained = copy.deepcopy(model).train()
    assert not torch.allclose(trained(source, target), trained(source, target))


@pytest.mark.parametrize("model_class", [Transformer, PreNormTransformer])
def test_fresh_weights(model_class):
    """Scaled embeddings of variance 1, matrices after Glorot and Bengio, neutral norms."""
    config = TransformerConfig(vocab_size=300, d_model=64, d_ff=96, n_encoder_layers=1)
    model = model_class(config)
    for name, p in model.named_parameters():
        if name == "token_embedding.weight":
            assert p.std().item() * 8 == pytest.approx(1, abs=0.03)
        elif p.ndim == 2:
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.95 * bound < p.abs().max() <= bound, name
        elif "norm.weight" in name:
            assert (p == 1).all(), name
        elif "norm.bias" in name:
            assert (p == 0).all(), name


@pytest.mark.parametrize(
    ("config", "millions"), [(TRANSFORMER_BASE, 63.1), (TRANSFORMER_BIG, 214.2)]
)
def test_parameter_counts_of_the_paper_s_models(config, millions):
    """By formula; table 3 of the paper says 65 and 213 million for two vocabularies."""
    with torch.device("meta"):
        count = sum(p.numel() for p in Transformer(config).parameters())
    D, F_, L = config.d_model, config.d_ff, config.n_encoder_layers
    attention = 4 * (D * D + D)
    ffn = 2 * D * F_ + F_ + D
    encoder = attention + ffn + 2 * 2 * D
    decoder = 2 * attention + ffn + 3 * 2 * D
    assert count == config.vocab_size * D + L * (encoder + decoder)
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


# --- Bad input ------------------------------------------------------------------------------------


def test_tokens_outside_the_vocabulary(model, source, target):
    for bad in (-1, V):
        wrong = source.clone()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match="token ids must lie between 0 and 28"):
            model(wrong, target)
        with pytest.raises(ValueError, match="token ids must lie between 0 and 28"):
            model(target, wrong)


def test_more_positions_than_the_model_has(model, source, target):
    with pytest.raises(ValueError, match="35 positions are needed, but the model has 32"):
        model(source.repeat(1, 5), target)
    caches = model.new_caches()
    memory = model.encode(source)
    model.decode(target.repeat(1, 6), memory, caches=caches)
    with pytest.raises(ValueError, match="33 positions are needed, but the model has 32"):
        model.decode(target[:, :3], memory, caches=caches)


def test_an_empty_target(model, source):
    with pytest.raises(ValueError, match="the target is empty"):
        model(source, torch.zeros(B, 0, dtype=torch.long))


def test_a_full_cache(model, source, target):
    caches, memory = model.new_caches(capacity=4), model.encode(source)
    with pytest.raises(ValueError, match="the cache is full"):
        model.decode(target, memory, caches=caches)


@pytest.mark.usefixtures("unchecked")
def test_a_source_and_a_target_of_different_batches(model, source, target):
    with pytest.raises(ValueError, match="x has batch 3, context 2"):
        model.decode(target, model.encode(source[:2]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "unknown activation 'tanh'; there are relu, silu"),
        ({"pad_id": V}, r"pad_id \(29\) must be below vocab_size \(29\)"),
        ({"pad_id": -1}, "pad_id must not be negative, got -1"),
        ({"d_model": "24"}, "d_model must be of type int, got '24'"),
        ({"n_heads": 4.0}, r"n_heads must be of type int, got 4\.0"),
        ({"n_decoder_layers": True}, "n_decoder_layers must be of type int, got True"),
        ({"scaled_embedding": 1}, "scaled_embedding must be of type bool, got 1"),
        ({"pad_id": "0"}, r"pad_id must be of type int \| None, got '0'"),
    ],
)
def test_a_config_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("n_heads", [0, 5])
def test_heads_that_do_not_divide_the_width(n_heads):
    with pytest.raises(ValueError, match=rf"n_heads \({n_heads}\)"):
        Transformer(dataclasses.replace(SMALL, n_heads=n_heads))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("attention_dropout", 0.1),
        ("activation_dropout", 0.1),
        ("encoder_layerdrop", 0.1),
        ("decoder_layerdrop", 0.1),
        ("normalize_before", True),
        ("normalize_embedding", True),
        ("add_final_layer_norm", True),
        ("static_position_embeddings", False),
        ("share_encoder_decoder_embeddings", False),
        ("tie_word_embeddings", False),
    ],
)
def test_options_of_marian_that_make_another_model(option, value):
    with pytest.raises(ValueError, match=f"config.json sets {option} to {value}"):
        Transformer.config_from_hf(Transformer.config_to_hf(SMALL) | {option: value})


def test_a_pre_norm_model_has_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face checkpoint format"):
        PreNormTransformer(SMALL).save_pretrained(tmp_path)
