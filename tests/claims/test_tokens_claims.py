"""The sources' claims on tokens, embeddings and logits, executed. The ledger is claims.yml."""

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from llm_anatomy.tokenization import BPE, ByteLevelBPE, Unigram, WordPiece
from tests.claims import tiny

# --- Tokens ---------------------------------------------------------------------------------------

WORDS = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat"]


def bert_tokenizer(folder: Path) -> transformers.BertTokenizer:
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCAB), encoding="utf-8")
    return transformers.BertTokenizer(vocab=str(path))


@pytest.mark.parametrize(
    "tokenizer",
    [
        BPE.train([" ".join(WORDS)], 22),
        WordPiece.train([" ".join(WORDS)], 36),
        Unigram.train([" ".join(WORDS)], 24),
    ],
    ids=lambda tokenizer: type(tokenizer).__name__,
)
def test_a_frequent_word_is_one_token_and_a_new_word_several(tokenizer: BPE) -> None:
    """C329: words or subwords, each from the vocabulary, and nothing unknown."""
    assert len(tokenizer.tokens("low")) == 1
    pieces = tokenizer.tokens("lowest")
    assert 1 < len(pieces) < len("lowest")
    assert set(pieces) <= set(tokenizer.vocab) - {"<unk>", "[UNK]"}


def chinese_byte_level(vocab_size: int) -> Tokenizer:
    """The library's own byte-level BPE, trained on sentences about cities."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cities = ("杭州", "苏州", "北京", "上海", "成都", "西安")
    kinds = ("好", "美丽的", "安静的", "有趣的")
    tokenizer.train_from_iterator([f"{c}是个{kind}地方" for c in cities for kind in kinds], trainer)
    return tokenizer


def test_several_characters_become_one_token_and_one_character_several() -> None:
    """C162: by frequency alone; a character that is rare stays in bytes."""
    tokenizer = chinese_byte_level(310)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("杭州是个好地方").ids]
    assert "是个好地方" in pieces
    assert "杭" not in pieces and pieces[0] == "\ufffd"
    assert len(tokenizer.encode("们").ids) == 3  # never seen


def test_seven_characters_may_be_four_tokens_or_twenty_one_or_one() -> None:
    """C161: the number of tokens depends on the vocabulary, so the ids cannot be checked without
    it; four is possible."""
    n_tokens = {size: len(chinese_byte_level(size).encode("杭州是个好地方").ids) for size in
                (256, 310, 330)}  # fmt: skip
    assert n_tokens == {256: 21, 310: 4, 330: 1}


def test_models_of_a_family_share_a_tokenizer_and_other_vocabularies_read_other_text(
    tmp_path: Path,
) -> None:
    """C159: DistilBERT's tokenizer is BERT's; and ids are noise to another vocabulary."""
    assert issubclass(transformers.DistilBertTokenizer, transformers.BertTokenizer)
    theirs = bert_tokenizer(tmp_path)
    ids = theirs("the cats", add_special_tokens=False)["input_ids"]
    assert theirs.decode(ids) == "the cats"
    ours = ByteLevelBPE.train(["the cats sat"], 262)
    assert ours.decode(ids) != "the cats" != ours.decode(ours.encode("the cats")[::-1])
    assert ours.decode(ours.encode("the cats")) == "the cats"


def test_ids_that_no_tokenizer_made_carry_no_cls(tmp_path: Path) -> None:
    """C081: [1, 2, 3, 4, 5] is whatever stands there in the vocabulary, and has no frame."""
    tokenizer = bert_tokenizer(tmp_path)
    real = tokenizer("the cat sat")["input_ids"]
    assert real[0] == tokenizer.cls_token_id and real[-1] == tokenizer.sep_token_id
    assert tokenizer.convert_ids_to_tokens([1, 2, 3, 4, 5]) == VOCAB[1:6]
    assert 1 != tokenizer.cls_token_id  # so the pooled output summarises another token


# --- BERT's input ---------------------------------------------------------------------------------


def test_the_first_token_is_cls_and_the_classifier_reads_it_alone(tmp_path: Path) -> None:
    """C017: logits are a function of the last state at position 0."""
    assert bert_tokenizer(tmp_path).cls_token_id == bert_tokenizer(tmp_path)("cat")["input_ids"][0]
    config = transformers.BertConfig(**tiny.kwargs_bert())
    model = tiny.randomise(transformers.BertForSequenceClassification(config))
    ids = tiny.tokens()
    with torch.no_grad():
        states = model.bert(ids).last_hidden_state
        pooled = torch.tanh(model.bert.pooler.dense(states[:, 0]))
        torch.testing.assert_close(model(ids).logits, model.classifier(pooled))


def test_segments_are_an_embedding_of_their_own() -> None:
    """C018: two of them by default; changing them changes what the model computes."""
    assert transformers.BertConfig().type_vocab_size == 2
    model, ids = tiny.bert(), tiny.tokens()
    segments = torch.zeros_like(ids)
    segments[:, 4:] = 1
    with torch.no_grad():
        one, two = model(ids).last_hidden_state, model(ids, token_type_ids=segments)[0]
        at_input = model.embeddings(ids, token_type_ids=segments) != model.embeddings(ids)
    assert at_input.any(-1)[0].tolist() == [False] * 4 + [True] * 4
    assert tiny.moved(one, two).all()


def test_bert_positions_are_trained_and_end() -> None:
    """C019: a table with a gradient, not a formula; there is no vector after the last one."""
    model = tiny.bert()
    table = model.embeddings.position_embeddings
    assert isinstance(table, nn.Embedding) and table.weight.requires_grad
    model(tiny.tokens()).last_hidden_state.square().sum().backward()
    assert table.weight.grad[:8].abs().sum(1).gt(0).all() and not table.weight.grad[8:].any()
    assert transformers.BertConfig().max_position_embeddings == 512
    with pytest.raises((RuntimeError, IndexError)):
        model(tiny.tokens(length=65))


def test_bert_embedding_is_the_norm_of_the_sum_and_not_the_sum() -> None:
    """C020."""
    layer, ids = tiny.bert().embeddings, tiny.tokens()
    with torch.no_grad():
        total = (
            layer.word_embeddings(ids)
            + layer.position_embeddings(torch.arange(8))
            + layer.token_type_embeddings(torch.zeros_like(ids))
        )
        assert not torch.allclose(layer(ids), total, atol=0.1)
        torch.testing.assert_close(layer(ids), layer.LayerNorm(total))


def test_pre_training_trains_every_layer_and_tables_are_a_fifth_of_bert() -> None:
    """C197: not word vectors alone."""
    with torch.device("meta"):
        base = transformers.BertModel(transformers.BertConfig())
    total = sum(p.numel() for p in base.parameters())
    tables = sum(p.numel() for n, p in base.named_parameters() if "_embeddings." in n)
    assert total == 109_482_240 and tables == (30_522 + 512 + 2) * 768
    assert 0.21 < tables / total < 0.22

    config = transformers.BertConfig(**tiny.kwargs_bert())
    model = tiny.randomise(transformers.BertForMaskedLM(config))
    ids = tiny.tokens()
    model(ids, labels=ids).loss.backward()
    blind = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in blind if "key.bias" not in name] == []  # those cancel in the softmax


# --- Embeddings -----------------------------------------------------------------------------------


def co_occurrences(lines: list[list[str]]) -> tuple[list[str], Tensor]:
    """Words, and how often each pair stands side by side."""
    words = sorted({word for line in lines for word in line})
    place = {word: i for i, word in enumerate(words)}
    counts = torch.zeros(len(words), len(words), dtype=torch.float64)
    for line in lines:
        for a, b in pairwise(line):
            counts[place[a], place[b]] += 1
            counts[place[b], place[a]] += 1
    return words, counts


def skip_gram(counts: Tensor, width: int = 8, k: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """word2vec's expected loss, minimised: the words' vectors before and after, and contexts'."""
    generator = torch.Generator().manual_seed(0)
    seen = counts / counts.sum()
    drawn = k * torch.outer(seen.sum(1), seen.sum(0))
    w, c = (0.1 * torch.randn(len(counts), width, generator=generator).double() for _ in range(2))
    before = w.clone()
    optimizer = torch.optim.Adam([w.requires_grad_(), c.requires_grad_()], lr=0.05)
    for _ in range(300):
        x = w @ c.T
        loss = -(seen * F.logsigmoid(x) + drawn * F.logsigmoid(-x)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, w.detach(), c.detach()


def animal_lines(seed: int = 0, pair: str = "cat dog") -> list[list[str]]:
    """The two of `pair` share their neighbours and never meet; "new" and "york" always meet."""
    rng = random.Random(seed)
    patterns = [
        ("a furry", pair, "slept ate"),
        ("toward across", "new york", "subway skyline"),
        ("every some", "car bus", "stopped turned"),
        ("fresh stale", "bread cake", "crumbled rose"),
    ]
    lines = []
    for _ in range(6000):
        left, middle, right = rng.choice(patterns)
        inner = middle.split() if middle == "new york" else [rng.choice(middle.split())]
        lines.append([rng.choice(left.split()), *inner, rng.choice(right.split())])
    words = sorted({word for line in lines for word in line})
    return [[rng.choice(words) if rng.random() < 0.1 else w for w in line] for line in lines]


def cosine(words: list[str], table: Tensor, a: str, b: str) -> float:
    return F.cosine_similarity(table[words.index(a)], table[words.index(b)], dim=0).item()


def test_similar_words_are_close_after_training_and_not_before() -> None:
    """C330, C341: at random initialisation the table says nothing."""
    words, counts = co_occurrences(animal_lines())
    before, after, _ = skip_gram(counts)
    alike = ("cat dog", "car bus", "bread cake")
    assert all(cosine(words, after, *pair.split()) > 0.9 for pair in alike)
    assert all(abs(cosine(words, before, *pair.split())) < 0.7 for pair in alike)
    assert cosine(words, after, "cat", "bread") < 0.5


def test_same_contexts_bring_words_close_and_standing_together_does_not() -> None:
    """C343: co-occurrence raises the product with the other word's context vector. Only where the
    two tables are added, as in GloVe, do words that meet come closer."""
    words, counts = co_occurrences(animal_lines())
    _, w, c = skip_gram(counts)
    cat, dog, new, york = (words.index(word) for word in ("cat", "dog", "new", "york"))
    assert counts[cat, dog] < 0.05 * counts[new, york]
    assert cosine(words, w, "cat", "dog") > 0.9 > 0.5 > cosine(words, w, "new", "york")
    assert w[new] @ c[york] > w[new] @ c[cat] + 2
    assert cosine(words, w + c, "new", "york") > cosine(words, w, "new", "york") + 0.2


def test_word2vec_is_a_procedure_whose_vectors_depend_on_the_corpus() -> None:
    """C344: the same code gives other neighbours from another text; nothing comes pre-trained."""
    first, second = animal_lines(pair="cat dog"), animal_lines(pair="cat rock")
    for lines, friend in ((first, "dog"), (second, "rock")):
        words, counts = co_occurrences(lines)
        _, w, _ = skip_gram(counts)
        others = [word for word in words if word != "cat"]
        best = sorted(others, key=lambda word: -cosine(words, w, "cat", word))
        assert friend in best[:1]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_table_starts_random_and_is_trained_with_the_model(name: str) -> None:
    """C331, C346: no vectors are loaded; rows of the batch move at the first step."""
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(**tiny.kwargs_bert())
        model = transformers.BertForMaskedLM(config)
        table = model.bert.embeddings.word_embeddings.weight
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.kwargs_gpt2()))
        table = model.transformer.wte.weight
    assert abs(table.detach().mean()) < 0.005 and 0.015 < table.detach().std() < 0.025
    before, ids = table.detach().clone(), tiny.tokens()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert (table != before).any(-1)[ids].all()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_lookup_is_the_same_in_every_context_and_the_states_are_not(name: str) -> None:
    """C332, C345: layer 0 is static, as word2vec is; layers above it are contextual."""
    model = tiny.bert() if name == "bert" else tiny.gpt2().transformer
    ids, position = tiny.tokens(length=6), 4
    other = tiny.changed(ids, 1)
    with torch.no_grad():
        one, two = (model(x, output_hidden_states=True).hidden_states for x in (ids, other))
    assert torch.equal(one[0][0, position], two[0][0, position])
    for a, b in zip(one[1:], two[1:], strict=True):
        assert not torch.allclose(a[0, position], b[0, position], atol=1e-4)


def test_dimensions_have_caught_up_with_vocabularies() -> None:
    """C342: 692 000 words and 300 dimensions in word2vec's paper; forty in BERT, four in GPT-3."""
    config = transformers.BertConfig()
    gpt3 = {"vocab_size": transformers.GPT2Config().vocab_size, "hidden_size": 12_288}
    assert 692_000 / 300 > 2_000
    assert 39 < config.vocab_size / config.hidden_size < 40
    assert 4 < gpt3["vocab_size"] / gpt3["hidden_size"] < 4.1


def test_gpt_begins_with_the_sum_of_its_two_tables() -> None:
    """C347: token and position, before the first block."""
    model, ids = tiny.gpt2().transformer, tiny.tokens()
    assert [name for name, _ in model.named_children()][:2] == ["wte", "wpe"]
    with torch.no_grad():
        first = model(ids, output_hidden_states=True).hidden_states[0]
        torch.testing.assert_close(first, model.wte(ids) + model.wpe(torch.arange(8)))


# --- Logits ---------------------------------------------------------------------------------------


def test_there_is_one_logit_for_each_token_of_the_vocabulary() -> None:
    """C336: after the last layer, by a map that GPT-2 ties to its embedding."""
    model = tiny.gpt2()
    with torch.no_grad():
        logits = model(tiny.tokens()).logits
    assert logits.shape == (1, 8, tiny.VOCAB)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_logit_is_a_log_probability_up_to_a_constant_and_no_probability() -> None:
    """C337, C352: negative ones occur, and a constant on all of them changes nothing."""
    with torch.no_grad():
        z = tiny.gpt2()(tiny.tokens()).logits[0].double()
    p = z.softmax(-1)
    assert (z < 0).any() and (z > 1).any()
    torch.testing.assert_close((z + 5).softmax(-1), p)
    torch.testing.assert_close(p.log(), z - z.logsumexp(-1, keepdim=True))
    assert not torch.allclose(z / z.sum(-1, keepdim=True), p)  # as it would be, for a probability
    e = z.exp()
    torch.testing.assert_close(e / e.sum(-1, keepdim=True), p)


def test_softmax_gives_a_distribution_given_the_text_before() -> None:
    """C338: positive, sums to one, and another text gives another one."""
    model, ids = tiny.gpt2(), tiny.tokens()
    with torch.no_grad():
        p = model(ids).logits[:, -1].double().softmax(-1)
        q = model(tiny.changed(ids, 2)).logits[:, -1].double().softmax(-1)
    assert (p > 0).all() and math.isclose(p.sum().item(), 1)
    assert not torch.allclose(p, q)


def test_the_logit_function_undoes_the_logistic_function() -> None:
    """C350: it maps (0, 1) onto the real line."""
    z = torch.linspace(-12, 12, 49, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(z.sigmoid()), z)
    p = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    assert torch.logit(p)[[0, 2]].tolist() == [-math.inf, math.inf]
    torch.testing.assert_close(torch.logit(p)[1], torch.tensor(math.log(0.3 / 0.7)).double())


def test_models_return_what_stands_before_the_softmax() -> None:
    """C351: the loss applies the softmax itself, and for two classes this is the logistic function
    of the difference."""
    model, ids = tiny.gpt2(), tiny.tokens()
    with torch.no_grad():
        out = model(ids, labels=ids)
    p = out.logits.softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    torch.testing.assert_close(out.loss, -p.log().mean())
    assert not torch.allclose(out.logits.sum(-1), torch.ones(1, 8))
    two = torch.tensor([0.3, -1.1], dtype=torch.float64)
    torch.testing.assert_close(two.softmax(0)[0], (two[0] - two[1]).sigmoid())
