"""Subword tokenizers: equal to the `tokenizers` library, and loud where they cannot go on."""

import json
import math
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers
from transformers import GPT2Tokenizer

from llm_anatomy.tokenization import (
    BPE,
    ByteLevelBPE,
    Unigram,
    WordPiece,
    association,
    bert_words,
    byte_words,
    em_step,
    learn_merges,
    prune,
    seed_pieces,
    space_words,
    viterbi,
)

ENGLISH = """the low lower lowest and the new newer newest are wide wider widest
a bank by the river holds water and a bank in the town holds money
she thanks the banker, who banks at the bank; it's the banker's bank, isn't it?
unable unhappy unhappily happily happiness able ably readable reading reader read reads
there are 12 ways in 2024 and 120 ways in 1999 to say that we'll do what they've done
the students who read the book have passed the test that the teacher gave to them
people who play and played and are playing with the player said that playing is play""".splitlines()
CHINESE = """今天的天气很好 我们去公园看花
明天的天气不好 我们不去公园 我们看书
学生看书 学生学习 学习中文很好 中文书很好看
银行在河边 河边有花 银行里有钱
他去银行取钱 她去河边看花 他们明天去公园""".splitlines()
CORPORA = {"english": ENGLISH, "chinese": CHINESE, "both": ENGLISH + CHINESE}
corpora = pytest.mark.parametrize("texts", CORPORA.values(), ids=CORPORA)

# Few different letters make ties, overlaps and repeated merges likely.
small_texts = st.lists(st.text(alphabet="abc n", min_size=1, max_size=12), min_size=1, max_size=8)
# Characters on which all Unicode versions agree, with each kind that the word patterns tell apart.
mixed = st.text(
    alphabet=st.one_of(
        st.sampled_from(
            "aAzsdmtrelv' '019 \t\n\r\f\v\x1c\x85\xa0\u2003\u3000_-.,!$+~^`|中文，。é½²Ⅳ٣€😀́"
        ),
        st.characters(max_codepoint=0x2FFF, exclude_categories=["Cs", "Cn"]),
    ),
    max_size=20,
)

# --- Words ----------------------------------------------------------------------------------------


def library_words(tokenizer, text: str) -> list[str]:
    theirs = tokenizer.to_tokenizers()
    if theirs.normalizer is not None:
        text = theirs.normalizer.normalize_str(text)
    return [word for word, _ in theirs.pre_tokenizer.pre_tokenize_str(text)]


TRAINED = {
    "bpe": BPE.train(ENGLISH + CHINESE, 180),
    "byte-level": ByteLevelBPE.train(ENGLISH + CHINESE, 340),
    "wordpiece": WordPiece.train(ENGLISH + CHINESE, 260),
    "unigram": Unigram.train(ENGLISH + CHINESE, 180),
}
trained = pytest.mark.parametrize("tokenizer", TRAINED.values(), ids=TRAINED)


def test_words_keep_their_space_in_sentencepiece():
    assert space_words("a bc") == ["▁a", "▁bc"]
    assert space_words("  a") == ["▁", "▁a"]
    assert space_words("") == []


def test_bert_puts_punctuation_and_chinese_characters_on_their_own():
    words = [word for word in bert_words("it's 中文, isn't") if word]
    assert words == ["it", "'", "s", "中", "文", ",", "isn", "'", "t"]


def test_gpt2_keeps_spaces_and_cuts_english_endings():
    assert byte_words("it's  12 we'll!") == ["it", "'s", "Ġ", "Ġ12", "Ġwe", "'ll", "!"]
    assert byte_words("中") == ["ä¸Ń"]


@trained
@settings(max_examples=150)
@given(text=mixed)
@example(text="it's we'LL they'd  x \n\n y\x1c'")
def test_words_are_those_of_the_library(tokenizer, text):
    # The library's table of punctuation is older than Python's.
    assume(
        not any(
            unicodedata.category(c)[0] == "P" and ord(c) > 0x2E00 and c not in "，。" for c in text
        )
    )
    assert [word for word in tokenizer.words(text) if word] == library_words(tokenizer, text)


# --- BPE ------------------------------------------------------------------------------------------


def library_bpe(ours: BPE, texts: list[str], vocab_size: int, specials, alphabet=()):
    """The library's own training, with the words and the decoder of ours."""
    theirs = ours.to_tokenizers()
    theirs.model = models.BPE(unk_token=ours.unk)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    theirs.train_from_iterator(texts, trainer)
    return theirs


def same_bpe(ours: BPE, theirs: Tokenizer) -> None:
    model = json.loads(theirs.to_str())["model"]
    assert [tuple(pair) for pair in model["merges"]] == ours.merges
    assert model["vocab"] == ours.ids


@corpora
@pytest.mark.parametrize("room", [0, 1, 40, 1000])
def test_bpe_learns_the_merges_of_the_library(texts, room):
    size = 1 + len(set("".join(texts).replace(" ", "▁")) | {"▁"}) + room
    ours = BPE.train(texts, size)
    theirs = library_bpe(ours, texts, size, ["<unk>"])
    same_bpe(ours, theirs)
    assert len(ours) == size if room < 1000 else len(ours) < size
    for text in [*ENGLISH, *CHINESE, "Zürich lowers 水 banking"]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(
            ours.encode(text), skip_special_tokens=False
        )


@settings(max_examples=100)
@given(texts=small_texts, room=st.integers(0, 12))
def test_bpe_breaks_ties_as_the_library_does(texts, room):
    size = 1 + len(set("".join(texts).replace(" ", "▁")) | {"▁"}) + room
    ours = BPE.train(texts, size)
    theirs = library_bpe(ours, texts, size, ["<unk>"])
    same_bpe(ours, theirs)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids


def test_a_merge_may_give_a_token_that_is_there_already():
    texts, specials = ["abc abc ab"], ["<unk>", "ab"]
    ours = BPE.train(texts, 10, specials)
    assert ours.merges[0] == ("a", "b")
    assert ours.ids["ab"] == 1
    same_bpe(ours, library_bpe(ours, texts, 10, specials))


@corpora
@pytest.mark.parametrize("size", [256, 257, 300, 400])
def test_byte_level_bpe_learns_the_merges_of_the_library(texts, size):
    ours = ByteLevelBPE.train(texts, size)
    alphabet = sorted(set(ours.vocab[:256]))
    theirs = library_bpe(ours, texts, size, [], alphabet)
    same_bpe(ours, theirs)
    for text in [*ENGLISH, *CHINESE, "Zürich 水 😀\n\n x"]:
        assert ours.encode(text) == theirs.encode(text).ids


def test_bpe_by_hand():
    """Sennrich et al.'s example: 'es' and 'est' come first, in nine of the sixteen words."""
    words = {tuple("low_"): 5, tuple("lower_"): 2, tuple("newest_"): 6, tuple("widest_"): 3}
    vocab = sorted(set().union(*words))
    merges = learn_merges(words, vocab, len(vocab) + 6)
    # Nine times each: e s, s t, t _; "e" has the smallest id. Then es t and t _; "t" has.
    assert merges[:3] == [("e", "s"), ("t", "_"), ("es", "t_")]
    assert merges[3] == ("l", "o")  # seven times, as o w; then lo w
    assert merges[4] == ("lo", "w")
    assert merges[5] == ("e", "w")  # six times, as n e and w est_
    assert vocab[-6:] == [left + right for left, right in merges]


def test_a_frequent_chinese_word_becomes_one_token():
    tokenizer = ByteLevelBPE.train(["今天天气", "天气好", "看天气"] * 5, 270)
    assert len("天气".encode()) == 6
    assert len(tokenizer.encode("天气")) == 1
    assert len(tokenizer.encode("水")) == 3


@settings(max_examples=200)
@given(text=st.text(max_size=30))
def test_byte_level_bpe_gives_any_text_back(text):
    tokenizer = TRAINED["byte-level"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 339), max_size=8))
def test_bytes_that_are_no_text_decode_as_in_the_library(ids):
    tokenizer = TRAINED["byte-level"]
    assert tokenizer.decode(ids) == tokenizer.to_tokenizers().decode(ids)


def test_a_gpt2_tokenizer_of_transformers_is_read(tmp_path):
    ours = TRAINED["byte-level"]
    theirs = GPT2Tokenizer(
        vocab=ours.ids, merges=ours.merges, unk_token="!", bos_token="!", eos_token="!"
    )
    theirs.save_pretrained(tmp_path)
    again = ByteLevelBPE.load(tmp_path / "tokenizer.json")
    assert (again.vocab, again.merges) == (ours.vocab, ours.merges)
    for text in [*ENGLISH, *CHINESE]:
        assert ours.encode(text) == theirs.encode(text)


# --- WordPiece ------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(text=st.one_of(mixed, st.text(alphabet="abdehiklnorstwy ", max_size=30)))
@example(text="x" * 100 + " " + "a" * 100 + " " + "a" * 101)
def test_wordpiece_cuts_as_the_library_does(text):
    assume(
        not any(
            unicodedata.category(c)[0] == "P" and ord(c) > 0x2E00 and c not in "，。" for c in text
        )
    )
    ours = TRAINED["wordpiece"]
    theirs = ours.to_tokenizers()
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.tokens(text) == theirs.encode(text).tokens
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))


def test_wordpiece_takes_the_longest_token_first():
    tokenizer = WordPiece(["[UNK]", "un", "una", "##able", "##ble", "##b", "##l"], max_length=8)
    assert tokenizer.tokens("unable") == ["una", "##ble"]
    assert tokenizer.tokens("unables") == ["[UNK]"]  # the whole word, since no token holds the s
    assert tokenizer.tokens("unableble") == ["[UNK]"]  # nine characters
    assert tokenizer.decode([2, 4, 1]) == "unable un"


def library_wordpiece(ours: WordPiece, texts: list[str], size: int) -> dict[str, int]:
    """The library numbers the characters inside words in an order that changes from run to run,
    and breaks ties by these numbers. Given as special tokens they have the numbers of ours."""
    counts = Counter(word for text in texts for word in bert_words(text) if word)
    firsts = sorted(set().union(*counts))
    inside = sorted({f"##{c}" for word in counts for c in word[1:]})
    given = [*ours.vocab[:5], *firsts, *inside]
    theirs = ours.to_tokenizers()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=given, show_progress=False)
    theirs.train_from_iterator(texts, trainer)
    return theirs.get_vocab()


@corpora
@pytest.mark.parametrize("room", [0, 30, 1000])
def test_wordpiece_learns_the_vocabulary_of_the_library(texts, room):
    words = [word for text in texts for word in bert_words(text) if word]
    size = 5 + len(set("".join(words))) + len({c for word in words for c in word[1:]}) + room
    ours = WordPiece.train(texts, size)
    assert ours.ids == library_wordpiece(ours, texts, size)


def test_by_association_rare_parts_that_always_meet_are_merged_first():
    texts = ["qu"] * 3 + ["ab", "ac", "bb", "cb", "aa"] * 10
    by_frequency = WordPiece.train(texts, 15).vocab[-1]
    by_association = WordPiece.train(texts, 15, score=association).vocab[-1]
    assert by_association == "qu"
    assert by_frequency != "qu"


# --- Unigram --------------------------------------------------------------------------------------


def segmentations(word: str, scores: dict[str, float]):
    if not word:
        yield []
    for end in range(1, len(word) + 1):
        if word[:end] in scores:
            for rest in segmentations(word[end:], scores):
                yield [word[:end], *rest]


def total(pieces, scores) -> float:
    return sum(scores[piece] for piece in pieces)


pieces_and_word = st.tuples(
    st.dictionaries(
        st.text(alphabet="abc", min_size=1, max_size=4),
        st.floats(-9, -0.1),
        min_size=1,
        max_size=12,
    ),
    st.text(alphabet="abc", min_size=1, max_size=8),
)


@settings(max_examples=150)
@given(case=pieces_and_word)
def test_viterbi_finds_the_best_of_all_segmentations(case):
    scores, word = case
    scores = {**dict.fromkeys("abc", -4.0), **scores}
    best = viterbi(word, scores, 4)
    assert "".join(best) == word
    everything = [total(pieces, scores) for pieces in segmentations(word, scores)]
    assert math.isclose(total(best, scores), max(everything), rel_tol=1e-12)


@settings(max_examples=150)
@given(case=pieces_and_word, unknown=st.text(alphabet="abcxy ▁", max_size=12))
def test_unigram_cuts_as_the_library_does(case, unknown):
    """Ties (all scores may be equal), unknown characters and runs of them included."""
    scores, word = case
    for values in (list(scores.values()), [-1.0] * len(scores)):
        ours = Unigram(["<unk>", *scores], [0.0, *values])
        theirs = ours.to_tokenizers()
        for text in (word, unknown, word + unknown + "x" + word, "<unk>x" + word):
            assert ours.encode(text) == theirs.encode(text).ids
            assert ours.decode(ours.encode(text)) == theirs.decode(
                ours.encode(text), skip_special_tokens=False
            )


@corpora
def test_a_vocabulary_that_the_library_trained_is_used_alike(texts, tmp_path):
    theirs = TRAINED["unigram"].to_tokenizers()
    theirs.model = models.Unigram()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Unigram.load(tmp_path / "tokenizer.json")
    for text in [*ENGLISH, *CHINESE, "Zürich lowers 水 banking"]:
        assert ours.encode(text) == theirs.encode(text).ids


def test_seeds_are_characters_and_what_occurs_twice():
    seeds = seed_pieces({"abab": 1, "cd": 1}, 10)
    assert seeds.keys() == {"a", "b", "c", "d", "ab"}
    assert math.isclose(math.exp(seeds["ab"]), 4 / 10)  # covers four characters; a and b two each
    assert seed_pieces({"abab": 1, "cd": 1}, 1).keys() == {"a", "b", "c", "d"}


@corpora
def test_the_log_likelihood_never_falls(texts):
    counts = Counter(word for text in texts for word in space_words(text))
    scores = seed_pieces(counts, 600)
    before = -math.inf
    for _ in range(12):
        new, log_likelihood = em_step(counts, scores)
        assert log_likelihood >= before - 1e-9 * abs(log_likelihood)
        assert math.isclose(sum(map(math.exp, new.values())), 1.0)
        scores, before = new, log_likelihood


@settings(max_examples=60)
@given(
    words=st.dictionaries(
        st.text(alphabet="abc", min_size=1, max_size=7), st.integers(1, 5), min_size=1, max_size=6
    )
)
def test_em_is_the_sum_over_all_segmentations(words):
    scores = seed_pieces(words, 12)
    new, log_likelihood = em_step(words, scores)
    expected, everything = Counter(), 0.0
    for word, n in words.items():
        cuts = list(segmentations(word, scores))
        weights = [math.exp(total(pieces, scores)) for pieces in cuts]
        everything += n * math.log(sum(weights))
        for pieces, weight in zip(cuts, weights, strict=True):
            for piece in pieces:
                expected[piece] += n * weight / sum(weights)
    assert math.isclose(log_likelihood, everything, rel_tol=1e-9)
    for piece, score in new.items():
        share = expected[piece] / expected.total()
        assert math.isclose(math.exp(score), share, rel_tol=1e-9, abs_tol=1e-12)


def test_pruning_keeps_characters_and_what_costs_most():
    words = {"abab": 10, "ac": 5, "cb": 1}
    scores = {"a": -3.0, "b": -3.0, "c": -3.0, "ab": -1.0, "ac": -2.0, "cb": -2.0, "ba": -2.0}
    assert prune(words, scores, 5) == {"a": -3.0, "b": -3.0, "c": -3.0, "ab": -1.0, "ac": -2.0}
    # ab is used 20 times and saves 5 nats each time; ac saves 4 nats 5 times, cb 4 nats once.
    assert list(prune(words, scores, 4))[-1] == "ab"


def test_a_character_that_never_stands_alone_keeps_a_chance():
    tokenizer = Unigram.train(["qua que qui"] * 20, 14)
    floor = math.log(0.5 / (20 * 12))
    assert tokenizer.scores[tokenizer.ids["q"]] >= floor - 1e-9
    assert min(tokenizer.scores) == pytest.approx(floor)


def test_unigram_training_comes_near_to_the_library():
    """The library's EM drops pieces on the way and subtracts a digamma term, its seeds and its cost
    of a piece differ a little: the vocabularies are not equal. Most words are cut alike, into as
    many tokens, and our pieces explain the text no worse."""
    licence = Path(__file__).resolve().parent.parent / "LICENSE-CODE"
    texts = licence.read_text(encoding="utf-8").splitlines()
    theirs = TRAINED["unigram"].to_tokenizers()
    theirs.model = models.Unigram()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    theirs = Unigram(*zip(*json.loads(theirs.to_str())["model"]["vocab"], strict=True))
    ours = Unigram.train(texts, len(theirs))
    assert len(ours) == len(theirs) == 200

    counts = Counter(word for text in texts for word in space_words(text))
    n_words = counts.total()
    log_likelihoods, n_tokens = [], []
    for tokenizer in (ours, theirs):
        scores = dict(zip(tokenizer.vocab[1:], tokenizer.scores[1:], strict=True))
        norm = math.log(sum(map(math.exp, scores.values())))
        scores = {piece: score - norm for piece, score in scores.items()}
        log_likelihoods.append(em_step(counts, scores)[1] / n_words)
        n_tokens.append(sum(n * len(tokenizer.pieces(word)) for word, n in counts.items()))
    alike = sum(n for word, n in counts.items() if ours.pieces(word) == theirs.pieces(word))
    assert log_likelihoods[0] > log_likelihoods[1]
    assert 0.95 < n_tokens[0] / n_tokens[1] < 1.05
    assert alike / n_words > 0.7


# --- All ------------------------------------------------------------------------------------------


@trained
def test_files_are_those_of_the_library(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again, theirs = type(tokenizer).load(path), Tokenizer.from_file(str(path))
    state, before = vars(again), vars(tokenizer)
    assert state.keys() == before.keys()
    for name, value in state.items():  # the library may read a score's last bit differently
        assert value == (
            pytest.approx(before[name], rel=1e-14) if "score" in name else before[name]
        )
    for text in [*ENGLISH, *CHINESE]:
        assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text).ids


@trained
@pytest.mark.parametrize("text", [ENGLISH[2], CHINESE[0], "a bank 银行"])
def test_a_known_text_comes_back(tokenizer, text):
    back = tokenizer.decode(tokenizer.encode(text))
    if isinstance(tokenizer, WordPiece):  # spaces are lost around punctuation and Chinese
        assert back.replace(" ", "") == text.replace(" ", "")
    else:
        assert back == text


@trained
def test_an_empty_text_has_no_tokens(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@trained
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_an_empty_corpus_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match="there is no word in the corpus"):
        type(tokenizer).train(texts, 300)


@trained
def test_one_string_is_no_corpus(tokenizer):
    with pytest.raises(ValueError, match="got one string"):
        type(tokenizer).train("the bank", 300)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        (BPE, 4, r"vocab_size \(4\) has no room for the 1 special tokens and the 4 characters"),
        (ByteLevelBPE, 255, r"vocab_size \(255\) has no room for the 0 .* and the 256 characters"),
        (WordPiece, 9, r"vocab_size \(9\) has no room for the 5 special tokens and the 5 char"),
        (Unigram, 4, r"vocab_size \(4\) has no room for the 1 special tokens and the 4 characters"),
    ],
)
def test_a_vocabulary_smaller_than_the_alphabet_is_refused(kind, size, message):
    with pytest.raises(ValueError, match=message):
        kind.train(["abc"], size)
    assert kind.train(["abc"], size + 1).encode("abc")


@trained
def test_unknown_ids_are_refused(tokenizer):
    for wrong in (len(tokenizer), -1):
        with pytest.raises(ValueError, match=rf"lie between 0 and \d+, got \[{wrong}\]"):
            tokenizer.decode([0, wrong])


def test_vocabularies_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"repeat: \['a'\]"):
        WordPiece(["[UNK]", "a", "b", "a"])
    for build in (lambda: WordPiece(["a"]), lambda: Unigram(["a"], [0.0]), lambda: BPE(["a"], [])):
        with pytest.raises(ValueError, match="vocabulary lacks"):
            build()
    with pytest.raises(ValueError, match=r"vocabulary lacks \['ab'\]"):
        BPE(["<unk>", "a", "b"], [("a", "b")])
    with pytest.raises(ValueError, match="lacks 255 of the 256 bytes"):
        ByteLevelBPE(["a"], [])
    with pytest.raises(ValueError, match="2 tokens, but 1 scores"):
        Unigram(["<unk>", "a"], [0.0])
    with pytest.raises(ValueError, match="a share between 0 and 1, got 1"):
        Unigram.train(["abc"], 10, keep=1.0)
    with pytest.raises(ValueError, match="'ab' cannot be cut"):
        em_step({"ab": 1}, {"a": -1.0})


def test_files_of_another_tokenizer_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    TRAINED["wordpiece"].save(path)
    for kind in (BPE, ByteLevelBPE, Unigram):
        with pytest.raises(ValueError, match=f"holds a WordPiece model, no {kind.kind}"):
            kind.load(path)
    TRAINED["byte-level"].save(path)
    with pytest.raises(ValueError, match=r"the pre_tokenizer in .* is not that of BPE"):
        BPE.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no file of the tokenizers library"):
        BPE.load(path)
    with pytest.raises(FileNotFoundError):
        BPE.load(tmp_path / "absent.json")
