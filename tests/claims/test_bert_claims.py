"""The sources' claims on BERT, executed. The ledger is claims.yml.

What only the papers can say (scores on benchmarks, sizes of corpora) stands here as the papers'
numbers; what the sources conclude from them is computed.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from pybtex.database import parse_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import BertProcessing
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm_anatomy.models.bert import (
    BERT_BASE,
    BERT_LARGE,
    BertBlock,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from llm_anatomy.models.elmo import Elmo, ElmoConfig
from llm_anatomy.models.roberta import RobertaForMaskedLM
from llm_anatomy.objectives import (
    IGNORED,
    causal_lm,
    cross_entropy,
    masked_lm,
    permute_sentences,
    sentence_pairs,
)
from llm_anatomy.tiny_world.labels import TAGS, entities, sentiment
from llm_anatomy.tiny_world.pairs import next_sentence_optimum, next_sentences, questions
from llm_anatomy.tiny_world.stories import stories, story_grammar
from llm_anatomy.tiny_world.words import ENGLISH, vocabulary
from llm_anatomy.training import train
from tests.claims import tiny

V = tiny.VOCAB
CONFIG = BertConfig(
    vocab_size=V,
    n_layers=2,
    n_heads=4,
    d_model=32,
    d_ff=64,
    n_positions=64,
    attention_dropout=0.0,
    dropout=0.0,
    head_dropout=0.0,
)
MASK = 4

# Devlin et al., 2019, tables 1, 2, 5 and 7 (test sets; table 5: development sets).
SQUAD = {"human": (82.3, 91.2), "single": (85.1, 91.8), "ensemble": (87.4, 93.2)}  # EM, F1
ABSTRACTS = {  # score of GLUE and MultiNLI, and the improvement, in each version of the paper
    "October 2018": {"GLUE": (80.4, 7.6), "MultiNLI": (86.7, 5.6)},
    "NAACL 2019": {"GLUE": (80.5, 7.7), "MultiNLI": (86.7, 4.6)},
}
GPT = {"GLUE": 72.8, "MultiNLI": 82.1}  # what was best before
CONLL = {"BERT large": 92.8, "BERT base": 92.4, "ELMo": 92.2, "CVT": 92.6, "CSE": 93.1}  # F1
SST2 = {"BERT large": 94.9, "before GPT": 93.2, "GPT": 91.3}
ABLATION = {  # MNLI, QNLI, MRPC, SST-2, SQuAD
    "BERT base": (84.4, 88.4, 86.7, 92.7, 88.5),
    "no NSP": (83.9, 84.9, 86.5, 92.6, 87.9),
    "left to right, no NSP": (82.1, 84.3, 77.5, 92.1, 77.8),
    "and a BiLSTM on top": (82.1, 84.1, 75.7, 91.6, 84.9),
}
# Liu et al., 2019, table 2: SQuAD 1.1, SQuAD 2.0, MNLI-m, SST-2, RACE.
ROBERTA = {
    "segment pairs with NSP": (90.4, 78.7, 84.0, 92.9, 64.2),
    "full sentences, no NSP": (90.4, 79.1, 84.7, 92.5, 64.8),
    "within a document, no NSP": (90.6, 79.7, 84.7, 92.7, 65.6),
}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ours(kind: type = BertForPreTraining, config: BertConfig = CONFIG, seed: int = 0) -> nn.Module:
    return tiny.randomise(kind(config), seed)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what BERT is ---------------------------------------------------------------------------------


def test_the_paper_its_month_and_its_name() -> None:
    """C010, C011, C104, C195, C305: arXiv numbers start with year and month; the letters fit."""
    path = Path(__file__).resolve().parents[2] / "references.bib"
    entry = parse_file(str(path)).entries["devlin2019bert"]
    assert entry.fields["url"].split("/")[-1].startswith("1810.")
    assert entry.fields["title"].startswith("{BERT}: Pre-training of Deep Bidirectional")
    name = "Bidirectional Encoder Representations from Transformers"  # its abstract
    assert "".join(word[0] for word in name.split() if word[0].isupper()) == "BERT"
    assert name != name.replace("Representations", "Representation")


def test_parameters_by_formula_and_by_code() -> None:
    """C003: 109,482,240 and never 115 million, whichever vocabulary and heads are counted."""

    def formula(config: BertConfig) -> int:
        D, d_ff = config.d_model, config.d_ff
        rows = config.vocab_size + config.n_positions + config.n_segments + 2
        block = 4 * (D * D + D) + 2 * D * d_ff + d_ff + D + 4 * D
        return rows * D + config.n_layers * block + D * D + D

    assert size(BertModel(CONFIG)) == formula(CONFIG)
    assert formula(BERT_BASE) == 109_482_240
    assert formula(BERT_LARGE) == 335_141_888
    counts = []
    for vocabulary_size in (30_522, 28_996, 21_128):  # uncased, cased, Chinese
        config = BertConfig(vocab_size=vocabulary_size)
        D = config.d_model
        heads = D * D + D + 2 * D + vocabulary_size + 2 * D + 2
        counts += [formula(config), formula(config) + heads]
    assert counts[:3] == [109_482_240, 110_106_428, 108_310_272]
    assert counts[4] == 102_267_648
    assert max(counts) < 0.96 * 115e6
    extra = size(BertForPreTraining(CONFIG)) - size(BertModel(CONFIG))
    D = CONFIG.d_model
    assert extra == D * D + D + 2 * D + V + 2 * D + 2


def test_sizes_of_base_and_large() -> None:
    """C004: 12 layers, 768 features and 12 heads are one of two sizes."""
    theirs = transformers.BertConfig()
    assert (theirs.num_hidden_layers, theirs.hidden_size, theirs.num_attention_heads) == (
        (BERT_BASE.n_layers, BERT_BASE.d_model, BERT_BASE.n_heads)
    )
    assert (BERT_BASE.n_layers, BERT_BASE.d_model, BERT_BASE.n_heads) == (12, 768, 12)
    assert (BERT_LARGE.n_layers, BERT_LARGE.d_model, BERT_LARGE.n_heads) == (24, 1024, 16)


def test_blocks_are_the_encoder_s_with_another_activation() -> None:
    """C015, C021, C106, C196: with GELU, torch's encoder layer and BERT's block are one function.

    There is no cross-attention, hence nothing of a decoder; positions and segments are learned and
    the sum of the embeddings is normalised, unlike in 2017.
    """
    block = tiny.randomise(BertBlock(CONFIG)).double()
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, 0.0, F.gelu, CONFIG.eps, batch_first=True, norm_first=False
    ).double()
    state = block.state_dict()
    packed = {
        f"self_attn.in_proj_{part}": torch.cat([state[f"attention.{n}_proj.{part}"] for n in "qkv"])
        for part in ("weight", "bias")
    }
    names = {
        "attention.o_proj": "self_attn.out_proj",
        "attention_norm": "norm1",
        "ffn.up_proj": "linear1",
        "ffn.down_proj": "linear2",
        "ffn_norm": "norm2",
    }
    for mine, name in names.items():
        packed |= {f"{name}.{part}": state[f"{mine}.{part}"] for part in ("weight", "bias")}
    layer.load_state_dict(packed)
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(block(x), layer.eval()(x), rtol=0, atol=1e-10)

    model = ours()
    assert len({type(b) for b in model.bert.blocks}) == 1
    assert tiny.cross_attentions(tiny.bert()) == []
    tables = ("token_embedding", "position_embedding", "segment_embedding", "embedding_norm")
    assert all(size(getattr(model.bert, name)) for name in tables)


def test_three_parts_and_their_sizes() -> None:
    """C016: embeddings, encoder and pooler; the third part is an output head, not a stage."""
    assert [name for name, _ in tiny.bert().named_children()] == ["embeddings", "encoder", "pooler"]
    model = BertModel(CONFIG)
    D, L, d_ff = 32, 2, 64
    assert size(model.pooler) == D * D + D
    assert size(model.bert.blocks) == L * (4 * (D * D + D) + 2 * D * d_ff + d_ff + D + 4 * D)
    D, L, d_ff = 768, 12, 3072  # the same formulas for the base model
    sizes = (
        (30_522 + 512 + 2 + 2) * D,
        L * (4 * (D * D + D) + 2 * D * d_ff + d_ff + D + 4 * D),
        D * D + D,
    )
    assert sizes == (23_837_184, 85_054_464, 590_592)
    assert sum(sizes) == 109_482_240


# --- which way it looks ---------------------------------------------------------------------------


def test_both_sides_count_in_bert_and_one_in_gpt() -> None:
    """C015, C104, C106, C133, C195, C228, C240: change one token; whose vectors move?

    "bank" at position 3 with another right context: BERT's vector moves, GPT-2's does not at all,
    and ELMo's in one half: its two directions stand side by side.
    """
    ids = tiny.tokens()
    for position in (0, 3, 7):
        other = tiny.changed(ids, position)
        encoder, decoder = ours(BertForMaskedLM), tiny.gpt2().transformer
        assert tiny.moved(encoder(ids), encoder(other)).all()
        before, after = (decoder(i).last_hidden_state for i in (ids, other))
        assert torch.equal(tiny.moved(before, after), torch.arange(8) >= position)
        roberta = ours(RobertaForMaskedLM, BertConfig(**vars(CONFIG) | {"pad_id": 1}))
        assert tiny.moved(roberta(ids), roberta(other)).all()
        config = ElmoConfig(vocab_size=V, filters=((1, 5), (2, 6)), d_cell=12, d_model=8)
        elmo = tiny.randomise(Elmo(config))
        spelling = torch.randint(97, 123, (V, 4), generator=generator())
        halves = (elmo.hidden(elmo.embed(i, spelling))[-1].chunk(2, dim=-1) for i in (ids, other))
        moved = [tiny.moved(*half) for half in zip(*halves, strict=True)]
        assert torch.equal(moved[0], torch.arange(8) >= position)
        assert torch.equal(moved[1], torch.arange(8) <= position)


def test_bidirectional_by_its_mask_not_by_its_training() -> None:
    """C237: with the same weights, a causal mask makes a left-to-right model of BERT."""
    both = tiny.bert()
    causal = transformers.BertModel(transformers.BertConfig(**tiny.kwargs_bert(), is_decoder=True))
    causal.load_state_dict(both.state_dict())
    ids, other = tiny.tokens(), tiny.changed(tiny.tokens(), 5)
    assert tiny.moved(both(ids)[0], both(other)[0]).all()
    assert torch.equal(tiny.moved(causal.eval()(ids)[0], causal(other)[0]), torch.arange(8) >= 5)


def test_nothing_is_read_backwards() -> None:
    """C234: one pass over the tokens in their order, each block once: no reversed copy of the text.

    The weights of a head may put mass on both sides of the diagonal.
    """
    model, ids = tiny.bert(), tiny.tokens()
    seen = []
    model.embeddings.word_embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert tiny.count_calls(model.encoder.layer[0], lambda: model(ids)) == 1
    assert len(seen) == 1
    assert torch.equal(seen[0], ids)
    weights = model(ids, output_attentions=True).attentions[0]
    assert (weights.triu(1).sum() > 0) and (weights.tril(-1).sum() > 0)


def test_fully_visible_attention_is_not_a_fully_connected_layer() -> None:
    """C228: attention without a mask takes any length with the same weights; no linear map can."""
    block = tiny.randomise(BertBlock(CONFIG))
    assert [block(torch.zeros(1, T, 32)).shape[1] for T in (3, 9)] == [3, 9]
    dense = nn.Linear(3 * 32, 3 * 32)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dense(torch.zeros(1, 9 * 32))


def test_a_word_is_easier_with_both_sides_in_view() -> None:
    """C032, C045: the exact entropies of the corpus: from the left, and from both sides."""
    grammar = story_grammar(1)
    left, both = grammar.entropy(), grammar.cross_entropy()
    assert both.per_text < 0.75 * left.per_text
    # What the paper measures: left to right loses on every task, a BiLSTM on top heals one of five.
    base, _, one_way, lstm = ABLATION.values()
    assert all(a > b for a, b in zip(base, one_way, strict=True))
    assert [b > a + 1 for a, b in zip(one_way, lstm, strict=True)] == [False] * 4 + [True]


def test_two_one_way_readers_side_by_side_are_less_than_one_two_way_reader() -> None:
    """C236: scores that add a left and a right part cannot say "exclusive or"; a joint one can.

    a(l) + b(r) obeys s00 + s11 = s01 + s10, so the four margins cannot have the signs + - - +.
    """
    target = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    design = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]]).double()
    best = torch.linalg.lstsq(design, target.flatten()[:, None]).solution
    assert (design @ best).abs().max() < 1e-12  # the best additive score knows nothing
    a, b = torch.randn(2, 1000, 2, dtype=torch.float64, generator=generator())
    scores = a[:, :, None] + b[:, None, :]
    assert not ((scores.sign() == target).all(dim=(1, 2))).any()
    joint = target  # one number for each pair of contexts
    assert (joint.sign() == target).all()


def test_two_directions_cost_no_more_than_one() -> None:
    """C199: the same operations with and without a causal mask; what takes long is writing.

    A text of T tokens is encoded in one pass; writing T tokens takes T passes, one after another.
    """
    ids, counts = tiny.tokens(length=16), []
    for causal in (False, True):
        config = transformers.BertConfig(**tiny.kwargs_bert(), is_decoder=causal)
        model = tiny.randomise(transformers.BertModel(config))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert tiny.count_calls(model.encoder.layer[0], lambda: model(ids)) == 1
    gpt = tiny.gpt2()
    steps = tiny.count_calls(
        gpt.transformer.h[0],
        lambda: gpt.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False),
    )
    assert steps == 16


def test_bert_is_small_by_now() -> None:
    """C198: LLaMA's smallest model, of 2023, has more than sixty times as many parameters."""
    D, d_ff, L, vocab = 4096, 11_008, 32, 32_000
    llama = 2 * vocab * D + L * (4 * D * D + 3 * D * d_ff + 2 * D) + D
    assert llama == 6_738_415_616
    assert llama > 60 * 109_482_240


# --- hidden words ---------------------------------------------------------------------------------


def test_two_tasks_train_one_encoder() -> None:
    """C002, C022, C031, C154, C229: each task alone sends a gradient into every block."""
    model = ours()
    ids = tiny.tokens(batch=2)
    for task in range(2):
        model.zero_grad()
        tokens, follows = model(ids)
        assert tokens.shape == (2, 8, V)
        assert follows.shape == (2, 2)
        loss = cross_entropy(tokens, ids) if task == 0 else cross_entropy(follows, ids[:, 0] % 2)
        loss.backward()
        for block in model.bert.blocks:
            assert block.attention.v_proj.weight.grad.abs().max() > 0
            assert block.ffn.up_proj.weight.grad.abs().max() > 0
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**tiny.kwargs_bert()))
    assert [name for name, _ in theirs.cls.named_children()] == ["predictions", "seq_relationship"]


def hidden(n: int = 400_000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Many tokens of a large vocabulary: original, inputs, targets, and which may be chosen."""
    tokens = torch.randint(5, 30_000, (n // 400, 400), generator=generator())
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    maskable[:, ::40] = False  # as special tokens are
    inputs, targets = masked_lm(
        tokens, maskable, mask_id=MASK, vocab_size=30_000, generator=generator(1)
    )
    return tokens, inputs, targets, maskable


def test_fifteen_per_cent_and_their_three_fates() -> None:
    """C033, C034, C035, C036, C039, C238: counted; special tokens are never chosen.

    Random tokens are 1.5 % of the text: it is these, not the 15 %, of which the paper says that
    they do no harm.
    """
    tokens, inputs, targets, maskable = hidden()
    chosen = targets != IGNORED
    assert not (chosen & ~maskable).any()
    assert abs(chosen[maskable].float().mean() - 0.15) < 0.003
    masked = inputs == MASK
    changed = (inputs != tokens) & ~masked
    kept = chosen & (inputs == tokens)
    for part, share in ((masked, 0.8), (changed, 0.1), (kept, 0.1)):
        assert abs(part[chosen].float().mean() - share) < 0.01
        assert not (part & ~chosen).any()
    assert abs(changed[maskable].float().mean() - 0.015) < 0.001
    assert abs(masked[maskable].float().mean() - 0.12) < 0.003
    assert torch.equal(targets[chosen], tokens[chosen])


def test_hidden_words_are_seen_as_hidden_and_the_other_targets_are_not() -> None:
    """C037: the model sees where [MASK] stands; kept targets look like any other token."""
    tokens, inputs, targets, _ = hidden()
    chosen = targets != IGNORED
    assert (chosen[inputs == MASK]).all()  # [MASK] gives itself away
    visible = inputs != MASK
    kept = chosen & (inputs == tokens)
    assert torch.equal(inputs[kept], tokens[kept])
    # Of the visible tokens 2.3 % are targets, and their ids are as spread as those of the others.
    assert 0.02 < chosen[visible].float().mean() < 0.05
    means = [inputs[visible & part].double().mean().item() for part in (chosen, ~chosen)]
    assert abs(means[0] / means[1] - 1) < 0.03


def test_few_positions_give_a_loss() -> None:
    """C038: of 128 tokens about 19 are asked for, where next-token prediction asks for 127."""
    tokens = torch.randint(5, V, (500, 128), generator=generator())
    every = torch.ones_like(tokens, dtype=torch.bool)
    _, targets = masked_lm(tokens, every, mask_id=MASK, vocab_size=V, generator=generator(1))
    per_text = (targets != IGNORED).sum(dim=1).float().mean().item()
    assert abs(per_text - 0.15 * 128) < 1
    assert (causal_lm(tokens)[1] != IGNORED).sum(dim=1).unique().tolist() == [127]
    assert 127 / per_text > 6


def test_a_hidden_word_is_predicted_from_its_context() -> None:
    """C008, C158: a small model, trained to fill in, uses the word on either side of the gap.

    In each text the middle repeats the first token, or the last one, as a flag says.
    """

    def batch(step: int, B: int = 64) -> tuple[Tensor, Tensor]:
        g = generator(step)
        ends = torch.randint(10, V, (B, 2), generator=g)
        flag = torch.randint(2, (B, 1), generator=g)
        tokens = torch.cat([ends[:, :1], 5 + flag, ends.gather(1, flag), ends[:, 1:]], dim=1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, 2] = tokens[:, 2]
        return tokens.index_fill(1, torch.tensor([2]), MASK), targets

    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5)  # 0.02 suits a width of 768
    train(model, lambda m, b: cross_entropy(m(b[0]), b[1]), batch, 250, lambda step: 3e-3)
    inputs, targets = batch(10**6, 500)
    with torch.no_grad():
        right = model(inputs)[:, 2].argmax(dim=-1) == targets[:, 2]
    assert right.float().mean() > 0.95


def test_hidden_words_never_come_up_after_pre_training() -> None:
    """C046: [MASK] is in every batch of pre-training and in none of any task afterwards."""
    words = vocabulary()
    mask = words.ids["[MASK]"]
    ids, keep = words.batch(stories(50))
    inputs, _ = masked_lm(ids, keep, mask_id=mask, vocab_size=len(words), generator=generator())
    assert (inputs == mask).any()
    for texts in (
        [e.words for e in sentiment(50)],
        [e.words for e in entities(50)],
        [e.first + e.second for e in next_sentences(50)],
        [e.question + e.context for e in questions(50)],
    ):
        assert not (words.batch(texts)[0] == mask).any()


def test_filling_in_gives_no_probability_of_a_text() -> None:
    """C047, C239: p(a | [MASK]) p(b | a) depends on which of two words is filled in first."""
    model = ours(BertForMaskedLM)
    a, b = 7, 9

    def p(ids: list[int], position: int, token: int) -> float:
        with torch.no_grad():
            return model.double()(torch.tensor([ids]))[0, position].softmax(-1)[token].item()

    left_first = p([5, MASK, MASK, 6], 1, a) * p([5, a, MASK, 6], 2, b)
    right_first = p([5, MASK, MASK, 6], 2, b) * p([5, MASK, b, 6], 1, a)
    assert not math.isclose(left_first, right_first, rel_tol=1e-3)


def test_no_left_to_right_writing_but_sampling() -> None:
    """C005, C047, C328: BERT has no `generate` and no next word; filling in again and again writes.

    What it says of the last position of a prompt is about that token, and moves with what follows.
    """
    for kind in (transformers.BertModel, transformers.BertForMaskedLM):
        assert not hasattr(kind, "generate")
    assert hasattr(transformers.GPT2LMHeadModel, "generate")
    model = ours(BertForMaskedLM)
    prompt = tiny.tokens(length=5)
    longer = torch.cat([prompt, tiny.tokens(length=3, seed=9)], dim=1)
    assert not torch.equal(model(prompt)[0, 4], model(longer)[0, 4])
    gpt = tiny.gpt2()
    assert torch.allclose(gpt(prompt).logits[0, 4], gpt(longer).logits[0, 4], atol=1e-4)

    g, text = generator(), torch.full((1, 6), MASK)
    with torch.no_grad():
        for step in range(18):
            t = step % 6
            text[0, t] = MASK
            p = model(text)[0, t].softmax(-1)
            p[MASK] = 0
            text[0, t] = torch.multinomial(p, 1, generator=g)
    assert not (text == MASK).any()


# --- pairs of sentences ---------------------------------------------------------------------------


def documents() -> list[list[list[int]]]:
    """Sentences of two numbers: the document, and the place in it."""
    return [[[100 + d, place] for place in range(6)] for d in range(20)]


def test_half_of_the_pairs_follow() -> None:
    """C040, C042, C155, C157: the label says whether the second really follows; order is no matter.

    In no pair are the two swapped, and inside a sentence nothing is moved.
    """
    pairs, labels = sentence_pairs(documents(), 4000, generator())
    assert abs(labels.float().mean() - 0.5) < 0.03
    for (first, second), label in zip(pairs, labels.tolist(), strict=True):
        follows = first[0] == second[0] and second[1] == first[1] + 1
        assert follows == (label == 0)
        assert label == 0 or first[0] != second[0]
        assert first[0] >= 100 and second[0] >= 100  # each sentence whole, as it stands
    # The tasks that it is taken for: BART restores the order of a document's sentences …
    document = documents()[0]
    shuffled = permute_sentences(document, generator(3))
    assert shuffled != document
    assert sorted(shuffled) == document
    # … and ALBERT asks whether two sentences that do follow each other were swapped.
    swapped = [(document[1], document[0]), (document[0], document[1])]
    assert all(first[0] == second[0] for first, second in swapped)


def test_a_sentence_is_any_span_of_text() -> None:
    """C041: first parts may start anywhere, and most sentences serve as second parts as well."""
    pairs, _ = sentence_pairs(documents(), 4000, generator())
    firsts = {tuple(first) for first, _ in pairs}
    seconds = {tuple(second) for _, second in pairs}
    assert len(firsts & seconds) > 50
    assert not any(place == 5 for _, place in firsts)  # the last one has nothing after it


def test_one_word_of_the_topic_nearly_solves_next_sentence() -> None:
    """C043: in the tiny world one look at the thing that is talked about gives the best score."""
    data = next_sentences(4000, seed=2)
    things = set(ENGLISH.objects)
    right = sum(
        (not things.isdisjoint(set(pair.first) & set(pair.second))) == bool(pair.label)
        for pair in data
    )
    assert right / len(data) > 0.94
    assert next_sentence_optimum() - right / len(data) < 0.03


def test_without_next_sentence_nothing_is_lost() -> None:
    """C230: in RoBERTa's comparison both forms without it match or beat BERT's on four of five."""
    with_nsp = ROBERTA["segment pairs with NSP"]
    for name in ("full sentences, no NSP", "within a document, no NSP"):
        assert sum(a >= b for a, b in zip(ROBERTA[name], with_nsp, strict=True)) == 4
    # BERT's own ablation, with the inputs left as they were, had found a loss on every task.
    pairs = zip(ABLATION["BERT base"], ABLATION["no NSP"], strict=True)
    assert all(a > b for a, b in pairs)


def test_special_tokens_frame_one_text_and_two() -> None:
    """C107: [CLS] in front, [SEP] between and at the end."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    assert tokenizer.encode("a b").tokens == ["[CLS]", "a", "b", "[SEP]"]
    pair = tokenizer.encode("a", "b b")
    assert pair.tokens == ["[CLS]", "a", "[SEP]", "b", "b", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 1, 1, 1]


def test_the_first_vector_feeds_a_classifier() -> None:
    """C156, C157: the answer is one of two classes, computed from [CLS]'s vector alone."""
    model = ours()
    ids = tiny.tokens(batch=3)
    x = model.bert(ids)
    logits = model.nsp(model.pooler(x))
    assert logits.shape == (3, 2)
    others = x.clone()
    others[:, 1:] = 0
    assert torch.equal(logits, model.nsp(model.pooler(others)))  # from position 0 alone
    assert not torch.equal(x, ours().bert(tiny.changed(ids, 5)))  # which has looked at all others


# --- tasks ----------------------------------------------------------------------------------------


def test_a_new_head_guesses() -> None:
    """C109: the classifier on top of a checkpoint is drawn at random, and so is its label."""
    encoder, ids = ours(BertModel), tiny.tokens(batch=1)
    labels = []
    for seed in range(40):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(CONFIG).eval()
        model.bert, model.pooler = encoder.bert, encoder.pooler
        labels.append(model(ids).argmax().item())
    assert 8 <= sum(labels) <= 32
    stored = {rule.theirs for rule in BertForPreTraining.hf_rules(CONFIG)}
    assert "classifier.weight" not in stored  # pre-training leaves nothing to load there


def inputs_of(texts: list[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
    return vocabulary().batch([("[CLS]", *text, "[SEP]") for text in texts])


@pytest.mark.parametrize("task", ["one text", "pair", "tags", "span"])
def test_a_head_for_each_kind_of_task(task: str) -> None:
    """C009, C027, C133, C153, C209: the same encoder under four heads learns what it is shown.

    Sentiment of a text, relation of a pair, names in a sentence, answer to a question: each on 16
    examples, until it has them all.
    """
    n = 16
    if task == "one text":
        examples = sentiment(n)
        ids, keep = inputs_of([e.words for e in examples])
        kind, wanted = BertForSequenceClassification, torch.tensor([e.label for e in examples])
    elif task == "pair":
        pairs = next_sentences(n)
        ids, keep = inputs_of([(*e.first, "[SEP]", *e.second) for e in pairs])
        kind, wanted = BertForSequenceClassification, torch.tensor([e.label for e in pairs])
    elif task == "tags":
        tagged = entities(n)
        ids, keep = inputs_of([e.words for e in tagged])
        kind, wanted = BertForTokenClassification, torch.full_like(ids, IGNORED)
        for row, e in zip(wanted, tagged, strict=True):
            row[1 : 1 + len(e.tags)] = torch.tensor([TAGS.index(tag) for tag in e.tags])
    else:
        asked = questions(n)
        ids, keep = inputs_of([(*e.question, "[SEP]", *e.context) for e in asked])
        shift = 2 + len(asked[0].question)
        kind = BertForQuestionAnswering
        wanted = torch.tensor([(e.start + shift, e.end + shift) for e in asked])
    config = BertConfig(**vars(CONFIG) | {"vocab_size": len(vocabulary()), "n_labels": len(TAGS)})
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5)

    def stacked(model: nn.Module) -> Tensor:
        out = model(ids, keep=keep)
        return torch.stack(out, dim=1) if isinstance(out, tuple) else out

    train(model, lambda m, _: cross_entropy(stacked(m), wanted), lambda s: s, 120, lambda s: 3e-3)
    with torch.no_grad():
        right = (stacked(model).argmax(dim=-1) == wanted)[wanted != IGNORED]
    assert right.float().mean() > 0.95


# --- what the papers report -----------------------------------------------------------------------


def test_scores_of_the_two_versions() -> None:
    """C014: each version's improvement leads back to a score; only the later ones lead to GPT's."""
    before = {
        version: {task: round(score - gain, 1) for task, (score, gain) in scores.items()}
        for version, scores in ABSTRACTS.items()
    }
    assert before["October 2018"] == {"GLUE": 72.8, "MultiNLI": 81.1}
    assert before["NAACL 2019"] == GPT


def test_above_people_on_squad() -> None:
    """C012: in exact match and in F1, and already as a single model."""
    for model in ("single", "ensemble"):
        assert all(ours > people for ours, people in zip(SQUAD[model], SQUAD["human"], strict=True))


def test_eleven_tasks() -> None:
    """C013: eight of GLUE (without WNLI), SQuAD in both versions, and SWAG."""
    glue = ["MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE"]
    assert len([*glue, "SQuAD 1.1", "SQuAD 2.0", "SWAG"]) == 11


def test_named_entities_were_no_record() -> None:
    """C105: better on sentiment and inference; on names the best model before was better still."""
    assert SST2["BERT large"] > max(SST2["before GPT"], SST2["GPT"])
    assert ABSTRACTS["NAACL 2019"]["MultiNLI"][0] > GPT["MultiNLI"]
    assert max(CONLL, key=CONLL.get) == "CSE"
    assert CONLL["BERT large"] < CONLL["CSE"]


def test_words_of_pre_training() -> None:
    """C044: 800 + 2,500 million words; a million steps of 128,000 tokens are about forty passes."""
    words = 800e6 + 2_500e6
    assert words == 3.3e9
    assert 35 < 1_000_000 * 128_000 / words < 45
