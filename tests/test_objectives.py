"""Objectives: the counts of their rules, the library's own, and what must never be lost."""

import itertools
import math
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from llm_anatomy import objectives
from llm_anatomy.objectives import IGNORED

MASK, V = 4, 1000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- losses and shifts ----------------------------------------------------------------------------


def test_the_loss_is_that_of_torch_over_the_targets_that_count():
    logits = torch.randn(2, 5, 7)
    targets = torch.tensor([[1, IGNORED, 3, 6, IGNORED], [0, 0, IGNORED, 2, 5]])
    counted = targets != IGNORED
    expected = F.cross_entropy(logits[counted], targets[counted])
    torch.testing.assert_close(objectives.cross_entropy(logits, targets), expected)
    with pytest.raises(ValueError, match="nothing to average"):
        objectives.cross_entropy(logits, torch.full((2, 5), IGNORED))


def test_causal_targets_are_the_next_tokens():
    tokens = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]])
    inputs, targets = objectives.causal_lm(
        tokens, torch.tensor([[True] * 4, [True, True] + [False] * 2])
    )
    assert inputs.tolist() == [[5, 6, 7], [9, 5, 0]]
    assert targets.tolist() == [[6, 7, 8], [5, IGNORED, IGNORED]]
    assert tokens.tolist() == [[5, 6, 7, 8], [9, 5, 0, 0]]
    with pytest.raises(ValueError, match="two tokens"):
        objectives.causal_lm(tokens[:, :1])


def test_a_prefix_is_read_and_not_predicted():
    tokens = torch.tensor([[5, 6, 7, 8]] * 4)
    _, targets = objectives.prefix_lm(tokens, torch.tensor([0, 1, 2, 3]))
    ignored = (targets == IGNORED).sum(dim=1).tolist()
    assert ignored == [0, 0, 1, 2]  # the first token is no target either way
    assert targets[2].tolist() == [IGNORED, 7, 8]  # the first after the prefix is predicted
    for bad in (4, -1):
        with pytest.raises(ValueError, match="between 0 and 3"):
            objectives.prefix_lm(tokens[:1], torch.tensor([bad]))


# --- masked language modelling --------------------------------------------------------------------


def test_masking_follows_80_10_10():
    tokens = torch.randint(5, V, (400, 100), generator=seeded(1))
    maskable = torch.rand(tokens.shape, generator=seeded(2)) < 0.9
    inputs, targets = objectives.masked_lm(
        tokens, maskable, mask_id=MASK, vocab_size=V, generator=seeded()
    )
    chosen = targets != IGNORED
    assert not (chosen & ~maskable).any()
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    n, m = int(chosen.sum()), int(maskable.sum())
    shares = {
        (n / m): 0.15,
        ((inputs == MASK) & chosen).sum().item() / n: 0.8,
        ((inputs == tokens) & chosen).sum().item() / n: 0.1 + 0.1 / V,
    }
    for share, expected in shares.items():
        # Five standard deviations of a share of at least 5000 draws.
        assert abs(share - expected) < 5 * (expected * (1 - expected) / 5000) ** 0.5
    replaced = inputs[chosen & (inputs != MASK) & (inputs != tokens)]
    assert replaced.min() < 50 and replaced.max() > V - 50


def test_masking_counts_as_the_collator_of_transformers_does():
    from transformers import BertTokenizer, DataCollatorForLanguageModeling

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(5, V))]
    collate = DataCollatorForLanguageModeling(
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}), seed=0
    )
    tokens = torch.randint(5, V, (400, 100), generator=seeded(1))
    theirs = collate([{"input_ids": row} for row in tokens.tolist()])
    inputs, targets = objectives.masked_lm(
        tokens, torch.ones_like(tokens, dtype=torch.bool), mask_id=MASK, vocab_size=V,
        generator=seeded(),
    )  # fmt: skip

    def counts(inputs, targets) -> list[float]:
        chosen = targets != IGNORED
        kept = (inputs == tokens) & chosen
        return [x.sum().item() / tokens.numel() for x in (chosen, (inputs == MASK) & chosen, kept)]

    ours, reference = counts(inputs, targets), counts(theirs["input_ids"], theirs["labels"])
    assert ours == pytest.approx(reference, abs=0.012)  # five standard deviations of a difference


@pytest.mark.parametrize(
    "parts", [{"share": 1.2}, {"masked": -0.1}, {"masked": 0.8, "replaced": 0.3}]
)
def test_parts_that_are_none_are_refused(parts):
    tokens = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="parts must lie"):
        objectives.masked_lm(
            tokens, tokens.bool(), mask_id=MASK, vocab_size=V, generator=seeded(), **parts
        )


def test_next_sentences_follow_and_others_come_from_elsewhere():
    documents = [[[100 * d + s] for s in range(4)] for d in range(1, 6)]
    pairs, labels = objectives.sentence_pairs(documents, 2000, seeded())
    for (a, b), label in zip(pairs, labels.tolist(), strict=True):
        (a,), (b,) = a, b
        assert (b == a + 1) == (label == 0)
        assert (a // 100 == b // 100) == (label == 0)
    assert 0.45 < labels.float().mean() < 0.55
    others = Counter(
        (a[0] // 100, b[0] // 100) for (a, b), y in zip(pairs, labels, strict=True) if y
    )
    assert len(others) == 20 and min(others.values()) > 20  # every other document, all about alike
    for bad in (documents[:1], [[[1], [2]], [[3]]]):
        with pytest.raises(ValueError, match="two"):
            objectives.sentence_pairs(bad, 3, seeded())


# --- spans ----------------------------------------------------------------------------------------


@given(
    n=st.integers(2, 80),
    share=st.floats(0.05, 0.9),
    mean_length=st.floats(1.0, 6.0),
    seed=st.integers(0, 10**6),
)
def test_spans_cover_the_share_and_do_not_touch(n, share, mean_length, seed):
    spans = objectives.random_spans(n, seeded(seed), share=share, mean_length=mean_length)
    hidden = sum(end - start for start, end in spans)
    assert hidden == min(max(round(n * share), 1), n - 1)
    assert len(spans) == min(max(round(hidden / mean_length), 1), n - hidden)
    edges = [0, *itertools.chain(*spans)]
    assert all(a < b for a, b in itertools.pairwise(edges)) and edges[-1] <= n
    tokens = torch.randint(1000, (n,), generator=seeded(seed)).tolist()
    sentinels = list(range(5000, 5100))
    source, target = objectives.corrupt_spans(tokens, spans, sentinels, end_id=1001)
    assert objectives.restore_spans(source, target, sentinels) == tokens
    # Nothing is said twice: every token stands in the source or in the target.
    assert Counter(t for t in source + target if t < 1000) == Counter(tokens)


def test_all_ways_to_cut_are_equally_likely():
    """Six tokens, half hidden in two spans: 2 cuts of the visible times 2 of the hidden."""
    seen = Counter(
        tuple(objectives.random_spans(6, seeded(s), share=0.5, mean_length=1.5))
        for s in range(2000)
    )
    assert len(seen) == 4 and min(seen.values()) > 400


def test_the_example_of_the_paper():
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    ids = {word: i for i, word in enumerate(words)}
    source, target = objectives.corrupt_spans(
        [ids[word] for word in words], [(2, 4), (8, 9)], [100, 101, 102], end_id=99
    )
    names = {i: word for word, i in ids.items()} | {100: "<X>", 101: "<Y>", 102: "<Z>", 99: "</s>"}
    assert " ".join(names[i] for i in source) == "Thank you <X> me to your party <Y> week . </s>"
    assert " ".join(names[i] for i in target) == "<X> for inviting <Y> last <Z> </s>"


@pytest.mark.parametrize("spans", [[(0, 0)], [(2, 3), (1, 2)], [(0, 2), (2, 3)], [(3, 9)]])
def test_spans_that_are_none_are_refused(spans):
    with pytest.raises(ValueError, match="span"):
        objectives.corrupt_spans([1, 2, 3, 4], spans, [10, 11, 12], end_id=0)
    with pytest.raises(ValueError, match="sentinels"):
        objectives.corrupt_spans([1, 2, 3, 4], [(0, 1), (2, 3)], [10, 11], end_id=0)
    with pytest.raises(ValueError, match="lacks"):
        objectives.restore_spans([10, 2, 0], [11, 1, 0], [10, 11])
    for n, share, mean in ((1, 0.5, 3.0), (5, 0.0, 3.0), (5, 0.5, 0.5)):
        with pytest.raises(ValueError, match="share"):
            objectives.random_spans(n, seeded(), share=share, mean_length=mean)


@given(n=st.integers(0, 60), share=st.floats(0.0, 1.0), seed=st.integers(0, 10**6))
def test_infilling_hides_the_share_and_keeps_the_rest_in_order(n, share, seed):
    tokens = list(range(100, 100 + n))
    damaged = objectives.infill_text(tokens, MASK, seeded(seed), share=share)
    visible = [token for token in damaged if token != MASK]
    assert visible == sorted(visible) and set(visible) <= set(tokens)
    assert len(visible) == n - round(share * n)
    if round(share * n):
        assert MASK in damaged


def test_infilling_draws_poisson_lengths():
    """Long text: the mean number of tokens behind a [MASK] is that of the distribution, 3."""
    tokens = list(range(10, 20_010))
    damaged = objectives.infill_text(tokens, MASK, seeded(), share=0.3)
    assert 6000 / damaged.count(MASK) == pytest.approx(3.0, rel=0.1)
    with pytest.raises(ValueError, match="mean length"):
        objectives.infill_text(tokens, MASK, seeded(), mean_length=0.0)
    with pytest.raises(ValueError, match="share"):
        objectives.infill_text(tokens, MASK, seeded(), share=1.5)


def test_some_masks_hide_nothing():
    """As many as a Poisson distribution of mean 3 has zeros: a share of exp(-3)."""
    damaged = objectives.infill_text(range(10, 20_010), MASK, seeded(), share=0.3)
    visible = [9, *(token for token in damaged if token != MASK), 20_010]
    gaps = sum(after > before + 1 for before, after in itertools.pairwise(visible))
    n_masks = damaged.count(MASK)
    # Four standard deviations of a share of about 2000 draws.
    assert (n_masks - gaps) / n_masks == pytest.approx(math.exp(-3), abs=0.02)


def test_sentences_are_permuted_whole():
    sentences = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
    seen = {
        tuple(map(tuple, objectives.permute_sentences(sentences, seeded(s)))) for s in range(40)
    }
    assert len(seen) > 25
    assert all(sorted(order) == sorted(map(tuple, sentences)) for order in seen)


def test_the_same_seed_gives_the_same_batch():
    tokens = torch.randint(5, V, (3, 20), generator=seeded(1))
    keep = torch.ones_like(tokens, dtype=torch.bool)

    def batch(seed: int) -> list:
        made = objectives.masked_lm(
            tokens, keep, mask_id=MASK, vocab_size=V, generator=seeded(seed)
        )
        return [part.tolist() for part in made]

    assert batch(1) == batch(1) != batch(2)
