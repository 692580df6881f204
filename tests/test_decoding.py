"""Decoding: the filters and searches of transformers on the same logits, and their invariants."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.generation import logits_process

from llm_anatomy import decoding
from llm_anatomy.cache import KVCache
from llm_anatomy.models.gpt2 import GPT2
from tests import parity

V, PAD = 13, 12


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def twins() -> tuple[GPT2, transformers.GPT2LMHeadModel]:
    config = transformers.GPT2Config(
        vocab_size=V,
        n_embd=12,
        n_layer=2,
        n_head=3,
        n_positions=64,
        bos_token_id=None,
        eos_token_id=None,  # so that a search without an end token has none of the model's own
    )
    # With this seed rows end at different lengths, and beams give way to branches of others.
    theirs = parity.randomise(transformers.GPT2LMHeadModel(config), seed=2)
    return parity.twin(theirs, GPT2), theirs


def nothing(tokens: Tensor) -> Tensor:
    raise AssertionError("a search that should have been refused asked the model")


def cached(model: GPT2, capacity: int | None = None) -> decoding.Cached:
    return decoding.Cached(lambda t, c: model(t, caches=c), model.new_caches(capacity))


# --- filters --------------------------------------------------------------------------------------

FILTERS = {
    "temperature": (decoding.temperature(0.7), logits_process.TemperatureLogitsWarper(0.7)),
    "top_k": (decoding.top_k(4), logits_process.TopKLogitsWarper(4)),
    "top_k of all": (decoding.top_k(99), logits_process.TopKLogitsWarper(99)),
    "top_p": (decoding.top_p(0.6), logits_process.TopPLogitsWarper(0.6)),
    "top_p, small": (decoding.top_p(0.01), logits_process.TopPLogitsWarper(0.01)),
    "min_p": (decoding.min_p(0.2), logits_process.MinPLogitsWarper(0.2)),
    "repetition": (
        decoding.repetition_penalty(1.7),
        logits_process.RepetitionPenaltyLogitsProcessor(1.7),
    ),
    "bigrams": (decoding.no_repeat_ngram(2), logits_process.NoRepeatNGramLogitsProcessor(2)),
    "trigrams": (decoding.no_repeat_ngram(3), logits_process.NoRepeatNGramLogitsProcessor(3)),
    "unigrams": (decoding.no_repeat_ngram(1), logits_process.NoRepeatNGramLogitsProcessor(1)),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_those_of_transformers(name: str):
    ours, theirs = FILTERS[name]
    changed = False
    for seed in range(20):
        logits = draw(3, V, seed=seed)
        tokens = torch.randint(4, (3, 9), generator=torch.Generator().manual_seed(seed))
        expected = theirs(tokens, logits.clone())
        torch.testing.assert_close(ours(logits, tokens), expected)
        changed |= not torch.equal(expected, logits)
    assert changed or name == "top_k of all"


def test_filters_leave_their_input_alone():
    for ours, _ in FILTERS.values():
        logits, tokens = draw(2, V), torch.zeros(2, 5, dtype=torch.long)
        before = logits.clone()
        ours(logits, tokens)
        assert torch.equal(logits, before)


def test_top_p_leaves_the_smallest_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    tokens = torch.zeros(1, 1, dtype=torch.long)
    left = {
        p: int(decoding.top_p(p)(logits, tokens).isfinite().sum()) for p in (0.49, 0.51, 0.81, 1.0)
    }
    assert left == {0.49: 1, 0.51: 2, 0.81: 3, 1.0: 4}


def test_an_ngram_longer_than_the_text_forbids_nothing():
    logits = draw(1, V)
    assert torch.equal(decoding.no_repeat_ngram(4)(logits, torch.tensor([[1, 1, 1]])), logits)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (decoding.temperature, 0.0),
        (decoding.temperature, float("nan")),
        (decoding.top_k, 0),
        (decoding.top_p, 0.0),
        (decoding.top_p, 1.1),
        (decoding.min_p, -0.1),
        (decoding.repetition_penalty, 0.0),
        (decoding.no_repeat_ngram, 0),
    ],
)
def test_settings_without_meaning_are_refused(make, value):
    with pytest.raises(ValueError, match=r"got|one token"):
        make(value)


# --- generation -----------------------------------------------------------------------------------


def reference(model, prompt: Tensor, n_new: int, **options) -> Tensor:
    config = transformers.GenerationConfig(
        max_new_tokens=n_new, do_sample=False, pad_token_id=PAD, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config
        )


@pytest.mark.parametrize("end_id", [None, 5, 7])
def test_greedy_is_that_of_transformers(twins, end_id):
    ours, theirs = twins
    prompt = torch.tensor([[1, 2, 3], [4, 6, 8], [9, 9, 1], [12, 0, 3]])
    expected = reference(theirs, prompt, 20, eos_token_id=end_id)
    lengths = {len(row) if end_id not in row else row.index(end_id) for row in expected.tolist()}
    assert end_id is None or len(lengths) > 1
    readers = (cached(ours), cached(ours, 64), decoding.Rereading(lambda t: theirs(t).logits))
    for reader in readers:
        found = decoding.generate(reader, prompt, 20, end_id=end_id, pad_id=PAD)
        assert torch.equal(found, expected)


def test_penalties_act_during_generation(twins):
    ours, theirs = twins
    prompt = torch.tensor([[1, 2, 3], [4, 6, 8]])
    filters = [decoding.repetition_penalty(1.3), decoding.no_repeat_ngram(2)]
    found = decoding.generate(cached(ours), prompt, 15, filters=filters)
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": None}
    assert torch.equal(found, reference(theirs, prompt, 15, **options))
    for row in found.tolist():
        pairs = list(itertools.pairwise(row))
        assert len(set(pairs)) == len(pairs)


def test_filters_act_in_the_order_given():
    """A high temperature before top-p makes room for the second token; after it, it is too late."""
    logits = torch.tensor([0.6, 0.4]).log()
    left: list[int] = []

    def pick(filtered: Tensor) -> Tensor:
        left.append(int(filtered.isfinite().sum()))
        return decoding.greedy(filtered)

    flat, nucleus = decoding.temperature(9.0), decoding.top_p(0.55)
    for filters in ([flat, nucleus], [nucleus, flat]):
        reader = decoding.Rereading(lambda t: logits.expand(*t.shape, 2))
        decoding.generate(reader, torch.tensor([[0]]), 1, pick=pick, filters=filters)
    assert left == [2, 1]


def test_sampling_draws_with_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(40_000, 4)
    drawn = decoding.sample(torch.Generator().manual_seed(0))(logits)
    share = F.one_hot(drawn, 4).double().mean(dim=0)
    # Six standard deviations of a share of 40 000 draws.
    assert ((share - p).abs() < 6 * (p * (1 - p) / 40_000).sqrt()).all()


def test_a_seed_fixes_the_text(twins):
    def text(seed: int) -> list:
        pick = decoding.sample(torch.Generator().manual_seed(seed))
        return decoding.generate(cached(twins[0]), torch.tensor([[1]]), 20, pick=pick).tolist()

    assert text(3) == text(3) != text(4)


def test_streaming_is_generating(twins):
    prompt = torch.tensor([[1, 2], [3, 4]])
    tokens = list(itertools.islice(decoding.stream(cached(twins[0]), prompt), 7))
    whole = decoding.generate(cached(twins[0]), prompt, 7)
    assert torch.equal(torch.stack(tokens, dim=1), whole[:, 2:])


def test_nothing_new_is_the_prompt():
    prompt = torch.tensor([[1, 2]])
    assert torch.equal(decoding.generate(decoding.Rereading(nothing), prompt, 0), prompt)


@pytest.mark.parametrize(
    "prompt", [torch.zeros(1, 0, dtype=torch.long), torch.tensor([1, 2]), torch.zeros(1, 2)]
)
def test_a_prompt_that_is_none_is_refused(prompt):
    reader = decoding.Rereading(lambda t: draw(*t.shape, V))
    for search in (
        lambda: decoding.generate(reader, prompt, 3),
        lambda: decoding.beam_search(reader, prompt, 3, width=2),
        lambda: decoding.contrastive_search(nothing, prompt, 3, k=2, alpha=0.5),
    ):
        with pytest.raises((ValueError, TypeError)) as told:
            search()
        assert "prompt" in str(told.value)


def test_filters_that_forbid_everything_are_reported():
    reader = decoding.Rereading(lambda t: torch.zeros(*t.shape, 2))
    with pytest.raises(ValueError, match="every token"):
        decoding.generate(reader, torch.tensor([[0, 1]]), 3, filters=[decoding.no_repeat_ngram(1)])


# --- beam search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("end_id", [None, 5, 7])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_beam_search_is_that_of_transformers(twins, width, end_id, length_penalty):
    ours, theirs = twins
    prompt = torch.tensor([[1, 2, 3], [4, 6, 8], [9, 9, 1]])
    options = {"num_beams": width, "eos_token_id": end_id, "length_penalty": length_penalty}
    if width > 1:
        options |= {"early_stopping": False}
    expected = reference(theirs, prompt, 9, **options)
    for reader in (cached(ours), decoding.Rereading(ours)):
        found, _ = decoding.beam_search(
            reader, prompt, 9, width=width, length_penalty=length_penalty, end_id=end_id, pad_id=PAD
        )
        assert torch.equal(found, expected)


def test_scores_of_beams_are_log_probabilities(twins):
    ours, _ = twins
    prompt = torch.tensor([[1, 2, 3], [4, 6, 8]])
    found, scores = decoding.beam_search(cached(ours), prompt, 6, width=3, length_penalty=0.0)
    with torch.no_grad():
        log_p = ours(found[:, :-1]).log_softmax(dim=-1)[:, 2:]
    total = log_p.gather(-1, found[:, 3:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(scores, total)


def test_a_beam_as_wide_as_the_tree_finds_the_likeliest_text():
    """With width V^(n-1) nothing is dropped, so the search is exhaustive."""
    table = draw(3, 3, seed=2)
    reader = decoding.Rereading(lambda t: table[t])
    prompt = torch.tensor([[0], [2]])
    found, scores = decoding.beam_search(reader, prompt, 3, width=9, length_penalty=0.0)
    log_p = table.log_softmax(dim=-1)
    for row, score in zip(found.tolist(), scores.tolist(), strict=True):
        every = {
            text: sum(log_p[a, b].item() for a, b in itertools.pairwise((row[0], *text)))
            for text in itertools.product(range(3), repeat=3)
        }
        assert tuple(row[1:]) == max(every, key=every.get)
        assert score == pytest.approx(max(every.values()), abs=1e-5)


def test_a_width_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        decoding.beam_search(decoding.Rereading(nothing), torch.tensor([[1]]), 3, width=0)


def test_a_cache_is_reordered_with_its_rows():
    for capacity in (None, 7):
        cache = KVCache(capacity)
        k, v = draw(3, 2, 4, 5), draw(3, 2, 4, 6, seed=1)
        cache.append(k, v)
        cache.reorder(torch.tensor([2, 2, 0]))
        k2, v2 = draw(3, 2, 1, 5, seed=2), draw(3, 2, 1, 6, seed=3)
        keys, values = cache.append(k2, v2)
        assert torch.equal(keys, torch.cat((k[[2, 2, 0]], k2), dim=2))
        assert torch.equal(values, torch.cat((v[[2, 2, 0]], v2), dim=2))
    KVCache().reorder(torch.tensor([0]))  # nothing there yet, nothing to do


# --- contrastive search ---------------------------------------------------------------------------


def test_contrastive_search_against_its_definition(twins):
    ours, _ = twins

    def states_and_logits(tokens: Tensor) -> tuple[Tensor, Tensor]:
        states = ours.hidden(ours.embed(tokens))
        return states, ours.logits(states)

    prompt, k, alpha = torch.tensor([[1, 2, 3], [4, 6, 8]]), 4, 0.6
    found = decoding.contrastive_search(states_and_logits, prompt, 6, k=k, alpha=alpha)
    with torch.no_grad():
        for row in found:
            for end in range(3, len(row)):
                p = states_and_logits(row[None, :end])[1][0, -1].softmax(dim=-1)
                scores = {}
                for v in p.topk(k).indices.tolist():
                    text = torch.cat((row[:end], torch.tensor([v])))
                    h = states_and_logits(text[None])[0][0]
                    worst = max(F.cosine_similarity(h[-1], h[j], dim=0).item() for j in range(end))
                    scores[v] = (1 - alpha) * p[v].item() - alpha * worst
                assert row[end].item() == max(scores, key=scores.get)
    plain = decoding.contrastive_search(states_and_logits, prompt, 6, k=k, alpha=0.0)
    assert torch.equal(plain, decoding.generate(cached(ours), prompt, 6))
    assert not torch.equal(plain, found)


@pytest.mark.parametrize(("k", "alpha"), [(0, 0.5), (2, -0.1), (2, 1.5)])
def test_contrastive_settings_without_meaning_are_refused(k, alpha):
    with pytest.raises(ValueError, match="alpha"):
        decoding.contrastive_search(nothing, torch.tensor([[1]]), 3, k=k, alpha=alpha)
