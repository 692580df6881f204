"""The tiny world: its entropies against brute force, its labels against the text itself."""

import math
import random
from collections import Counter, defaultdict
from dataclasses import astuple, fields
from itertools import product

import pytest
import torch

from llm_anatomy.tiny_world.grammar import Grammar, Rule, draw
from llm_anatomy.tiny_world.in_context import BIG, SMALL, in_context_optimum, prompts
from llm_anatomy.tiny_world.labels import agreements, banks, coreferences, entities, sentiment
from llm_anatomy.tiny_world.pairs import (
    GROUPS,
    PREMISES,
    entailment,
    next_sentence_optimum,
    next_sentences,
    questions,
)
from llm_anatomy.tiny_world.stories import STORIES, stories, story_grammar
from llm_anatomy.tiny_world.text_to_text import (
    back_translation_optimum,
    mixture,
    summaries,
    to_chinese,
    translations,
)
from llm_anatomy.tiny_world.words import (
    CHINESE,
    CHINESE_OBJECTS,
    ENGLISH,
    SPECIALS,
    Lexicon,
    Vocabulary,
    vocabulary,
)

VOCABULARY = vocabulary()
FEW = Lexicon(
    women=("anna", "bella"),
    men=("adam",),
    at_a_place=("found", "lost"),
    to_a_place=("took",),
    colors=("red", "blue"),
    objects=("kite", "book"),
    places=("park",),
    likes=("liked", "loved"),
    hates=("hated",),
    good=("good", "fine"),
    bad=("bad",),
    neutral=("new",),
    water=("fished", "swam"),
    money=("paid",),
    animals=("dog", "cat"),
    states=("wet",),
)
MAKERS = {
    "stories": stories,
    "sentiment": sentiment,
    "banks": banks,
    "agreements": agreements,
    "coreferences": coreferences,
    "entities": entities,
    "entailment": entailment,
    "next_sentences": next_sentences,
    "questions": questions,
    "translations": translations,
    "summaries": summaries,
    "mixture": mixture,
    "prompts": prompts,
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def near(share: float, expected: float, n: int) -> bool:
    """Whether a share of n draws lies within four standard errors of what is expected."""
    return abs(share - expected) < 4 * math.sqrt(max(expected * (1 - expected), 1e-3) / n)


def share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def split(words) -> list[list[str]]:
    """The sentences of a text."""
    sentences = [[]]
    for word in words:
        sentences[-1].append(word)
        if word == ".":
            sentences.append([])
    return sentences[:-1]


# --- The grammar, against brute force -------------------------------------------------------------


def all_texts(grammar: Grammar) -> dict[tuple[str, ...], float]:
    texts = list(grammar.texts())
    assert len({words for words, _ in texts}) == len(texts)  # one derivation each
    return dict(texts)


@pytest.fixture(scope="module", params=[0, 1])
def small(request):
    grammar = story_grammar(request.param, FEW)
    return grammar, all_texts(grammar)


def test_probabilities_sum_to_one(small):
    grammar, texts = small
    assert math.isclose(sum(texts.values()), 1.0, rel_tol=1e-12)
    for words, p in list(texts.items())[::7]:
        assert math.isclose(grammar.log_prob(words), math.log(p), rel_tol=1e-9)
    assert grammar.log_prob(("anna", "anna")) == -math.inf
    assert grammar.log_prob(words[:-1]) == -math.inf


def test_entropy_from_left_to_right_by_brute_force(small):
    """Sum over every prefix: what follows it, and how likely it is."""
    grammar, texts = small
    follow: dict[tuple, Counter] = defaultdict(Counter)
    for words, p in texts.items():
        for i, word in enumerate((*words, "[EOS]")):
            follow[words[:i]][word] += p
    nats = -sum(
        p * math.log(p / after.total()) for after in follow.values() for p in after.values()
    )
    length = sum(p * (len(words) + 1) for words, p in texts.items())
    found = grammar.entropy()
    assert math.isclose(found.per_text, nats, rel_tol=1e-9)
    assert math.isclose(found.n_tokens, length, rel_tol=1e-9)
    assert math.isclose(found.per_token, nats / length, rel_tol=1e-9)
    for prefix in list(follow)[::11]:
        after = grammar.next_words(prefix)
        assert after.keys() == follow[prefix].keys()
        for word, p in after.items():
            assert math.isclose(p, follow[prefix][word] / follow[prefix].total(), rel_tol=1e-9)


def test_entropy_from_both_sides_by_brute_force(small):
    """Group all texts that are equal but for one position; this uses no symmetry."""
    grammar, texts = small
    groups: dict[tuple, Counter] = defaultdict(Counter)
    for words, p in texts.items():
        for i, word in enumerate(words):
            groups[words[:i], None, words[i + 1 :]][word] += p
    nats = -sum(p * math.log(p / said.total()) for said in groups.values() for p in said.values())
    found = grammar.cross_entropy()
    assert math.isclose(found.per_text, nats, rel_tol=1e-9)
    length = sum(p * len(words) for words, p in texts.items())
    assert math.isclose(found.n_tokens, length, rel_tol=1e-9)


def test_missing_words_by_brute_force(small):
    grammar, texts = small
    rng = random.Random(1)
    for words in rng.sample(list(texts), 10):
        gaps = [None if rng.random() < 0.4 else word for word in words]
        for i, found in enumerate(grammar.missing_words(gaps)):
            said: Counter = Counter()
            for other, p in texts.items():
                fits = len(other) == len(words) and all(
                    gaps[j] in (None, other[j]) for j in range(len(words)) if j != i
                )
                if fits:
                    said[other[i]] += p
            assert found.keys() == said.keys()
            for word, p in found.items():
                assert math.isclose(p, said[word] / said.total(), rel_tol=1e-9)


def test_masked_entropy_by_brute_force():
    """All words hidden: what is left is the entropy of each position in texts of one length."""
    grammar = story_grammar(0, FEW)
    texts = all_texts(grammar)
    nats = 0.0
    for i in range(9):
        said: Counter = Counter()
        for words, p in texts.items():
            said[words[i]] += p
        nats -= sum(p * math.log(p) for p in said.values())
    mean, error = grammar.masked_entropy(1.0, 5)
    assert math.isclose(mean, nats / 9, rel_tol=1e-9)
    assert error < 1e-9


def test_the_reduced_world_has_the_shape_of_the_full_one():
    """Every rule has two variants somewhere, or brute force would prove nothing about variants."""
    sizes = {f.name: len(getattr(FEW, f.name)) for f in fields(FEW)}
    assert sum(size > 1 for size in sizes.values()) >= 8
    assert len(all_texts(story_grammar(1, FEW))) > 1000


# --- The full grammar, against samples ------------------------------------------------------------


@pytest.mark.parametrize("n_more", [0, 1, 2])
def test_entropy_from_left_to_right_by_samples(n_more):
    grammar = story_grammar(n_more)
    sample = stories(400, seed=3, n_more=n_more)
    nats = torch.tensor([-grammar.log_prob(words) for words in sample], dtype=torch.float64)
    error = nats.std() / len(sample) ** 0.5
    assert abs(nats.mean() - grammar.entropy().per_text) < 4 * error + 1e-9
    lengths = torch.tensor([len(words) + 1.0 for words in sample])
    assert abs(lengths.mean() - grammar.entropy().n_tokens) < 4 * lengths.std() / 20 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("n_more", "n"), [(1, 200), (2, 40)])
def test_entropy_from_both_sides_by_samples(n_more, n):
    grammar = {1: story_grammar(1), 2: STORIES}[n_more]
    sample = stories(n, seed=4, n_more=n_more)
    nats = torch.tensor(
        [
            -sum(math.log(q[w]) for w, q in zip(words, grammar.missing_words(words), strict=True))
            for words in sample
        ]
    )
    error = nats.std() / len(sample) ** 0.5
    assert error < 0.9
    assert abs(nats.mean() - grammar.cross_entropy().per_text) < 4 * error


@pytest.mark.slow
def test_the_optima_that_the_chapters_state():
    one, both = STORIES.entropy(), STORIES.cross_entropy()
    assert round(one.per_token, 4) == 0.7823
    assert round(both.per_token, 4) == 0.5450
    assert both.per_text < one.per_text  # to see both sides never makes a word harder
    few, many = STORIES.masked_entropy(0.02, 150), STORIES.masked_entropy(0.6, 60)
    assert abs(few[0] - both.per_token) < 4 * few[1] + 0.02
    assert many[0] > both.per_token + 4 * many[1]  # fewer words to see


def test_masked_entropy_is_what_the_best_guess_loses():
    grammar = story_grammar(1)
    mean, error = grammar.masked_entropy(0.15, 200, seed=5)
    rng, nats, hidden = random.Random(6), 0.0, 0
    for words in stories(200, seed=7, n_more=1):
        gaps = [None if rng.random() < 0.15 else word for word in words]
        for word, gap, q in zip(words, gaps, grammar.missing_words(gaps), strict=True):
            if gap is None:
                nats -= math.log(q[word])
                hidden += 1
    assert error < 0.08
    assert abs(nats / hidden - mean) < 6 * error


def test_a_bank_on_the_left_is_decided_only_on_the_right():
    grammar = story_grammar(1)
    event = STORIES.sample(random.Random(0), (("event", True, 0),))
    event = ("anna", *event[:3], "kite", *event[4:])
    for start in ("she left the kite and at the bank she", "she left the kite and she"):
        after = grammar.next_words((*event, *start.split()))
        river = sum(p for word, p in after.items() if word in ENGLISH.water)
        assert math.isclose(river, 0.5)
    words = "she left the kite and at the bank she fished while he _ ."
    gaps = [None if word == "_" else word for word in (*event, *words.split())]
    assert set(grammar.missing_words(gaps)[-2]) == set(ENGLISH.money)


# --- Every generator ------------------------------------------------------------------------------


@makers
def test_a_seed_gives_the_same_data_and_another_seed_others(make):
    assert make(20, seed=1) == make(20, seed=1)
    assert make(20, seed=1) != make(20, seed=2)
    assert make(20, seed=1)[:7] == make(7, seed=1)


def test_the_data_are_the_same_on_every_machine():
    assert " ".join(stories(1, seed=0)[0]) == (
        "george carried a brown lamp to the station . "
        "the bears that saw the lamp near the bear were busy . "
        "the bears that saw the lamp near the pig were busy ."
    )
    assert " ".join(translations(1, seed=2)[0].source) == (
        "henry took a black lamp to the museum ."
    )


@makers
def test_every_word_is_in_the_vocabulary(make):
    for example in make(200, seed=1):
        for part in [example] if isinstance(example, tuple) else vars(example).values():
            if isinstance(part, tuple) and make is not entities:
                VOCABULARY.encode(part)
    assert all(VOCABULARY.encode(example.words) for example in entities(50))


@makers
def test_no_example_is_refused(make):
    with pytest.raises(ValueError, match="at least one example, got n 0"):
        make(0)


# --- Labels, read again from the text -------------------------------------------------------------


def accuracy_by_word_counts(texts, labels) -> float:
    """The best guess of a label that knows how often each word occurs, and nothing else."""
    known: dict[tuple, Counter] = defaultdict(Counter)
    for words, label in zip(texts, labels, strict=True):
        known[tuple(sorted(words))][label] += 1
    return sum(max(counts.values()) for counts in known.values()) / len(labels)


def accuracy_word_by_word(texts, labels) -> float:
    """The best guess from the presence of one word."""
    best = 0.0
    for word in {word for words in texts for word in words}:
        by_presence: dict[bool, Counter] = defaultdict(Counter)
        for words, label in zip(texts, labels, strict=True):
            by_presence[word in words][label] += 1
        best = max(best, sum(max(c.values()) for c in by_presence.values()) / len(labels))
    return best


def test_sentiment():
    data = sentiment(4000, seed=1)
    for example in data:
        before = [example.words[i - 1] for i, w in enumerate(example.words) if w in ENGLISH.good]
        if before:
            praised = before != ["not"]
        else:
            (i,) = (i for i, w in enumerate(example.words) if w in ENGLISH.bad)
            praised = example.words[i - 1] == "not"
        assert example.label == praised
        assert example.words.count("not") == 1
    labels = [example.label for example in data]
    assert near(share(labels), 0.5, len(data))
    # In classes of words, so that every bag is met often: no bag tells more than a coin.
    kind = {w: "G" for w in ENGLISH.good} | {w: "B" for w in ENGLISH.bad}
    kind |= {w: "N" for w in ENGLISH.neutral} | {w: "O" for w in ENGLISH.objects}
    bags = [[kind.get(word, word) for word in example.words] for example in data]
    assert near(accuracy_by_word_counts(bags, labels), 0.5, len(data) / 2)
    assert accuracy_word_by_word([example.words for example in data], labels) < 0.54


def test_banks():
    data = banks(4000, seed=1)
    for example in data:
        words = example.words
        assert words[example.position] == "bank"
        here, there = (w for w in words if w in ENGLISH.water + ENGLISH.money)
        assert words[example.cue] == here
        assert example.river == (here in ENGLISH.water)
        assert (here in ENGLISH.water) != (there in ENGLISH.water)
        assert example.cue_is_left == (words.index(here) < words.index("bank"))
    assert near(share(example.river for example in data), 0.5, len(data))
    assert near(share(example.cue_is_left for example in data), 0.5, len(data))
    kind = {w: "W" for w in ENGLISH.water} | {w: "M" for w in ENGLISH.money}
    kind |= {w: "O" for w in ENGLISH.objects} | {"she": "P", "he": "P"}
    bags = [[kind.get(word, word) for word in example.words] for example in data]
    assert near(accuracy_by_word_counts(bags, [e.river for e in data]), 0.5, len(data) / 2)
    right = [example for example in data if not example.cue_is_left]
    lefts = [example.words[: example.position] for example in right]
    lefts = [[kind.get(word, word) for word in words] for words in lefts]
    assert near(accuracy_by_word_counts(lefts, [e.river for e in right]), 0.5, len(right) / 2)


def test_agreements():
    data = agreements(4000, seed=1)
    one = set(ENGLISH.animals)
    for example in data:
        words = example.words
        subject, attractor = (w for w in words if w.rstrip("s") in one)
        assert (words[example.subject], words[example.attractor]) == (subject, attractor)
        assert words[example.verb] == ("was" if subject in one else "were")
        assert example.many == (subject not in one)
        assert example.attracts == ((attractor in one) != (subject in one))
    assert near(share(example.many for example in data), 0.5, len(data))
    assert near(share(example.attracts for example in data), 0.5, len(data))
    kind = {w: "1" for w in one} | {w + "s": "2" for w in one}
    kind |= {w: "O" for w in ENGLISH.objects} | {w: "S" for w in ENGLISH.states}
    bags = [[kind.get(w, w) for i, w in enumerate(e.words) if i != e.verb] for e in data]
    assert near(accuracy_by_word_counts(bags, [e.many for e in data]), 0.75, len(data) / 2)


def test_coreferences():
    data = coreferences(4000, seed=1)
    for example in data:
        words = example.words
        names = ENGLISH.women if words[example.pronoun] == "she" else ENGLISH.men
        (meant,) = (i for i, word in enumerate(words) if word in names)
        (other,) = (
            i for i, w in enumerate(words) if w in ENGLISH.women + ENGLISH.men and i != meant
        )
        assert (example.antecedent, example.other) == (meant, other)
    assert near(share(example.antecedent == 0 for example in data), 0.5, len(data))
    assert near(share(e.words[e.pronoun] == "she" for e in data), 0.5, len(data))


def test_entities():
    data = entities(4000, seed=1)
    people = ENGLISH.women + ENGLISH.men
    for example in data:
        words, tags = example.words, []
        for i, word in enumerate(words):
            if word in people:
                tags.append("B-PER")
            elif word in ENGLISH.colors and words[i - 1] in people:
                tags.append("I-PER")
            elif word in ENGLISH.colors and words[i + 1] in ENGLISH.places:
                tags.append("B-LOC")
            elif word in ENGLISH.places and words[i - 1] != "the":
                tags.append("I-LOC")
            else:
                tags.append("O")
        assert list(example.tags) == tags
    for words, rate in ((ENGLISH.colors, 0.5), (ENGLISH.places, 0.5), (people, 1.0)):
        tags = Counter(
            tag for e in data for word, tag in zip(e.words, e.tags, strict=True) if word in words
        )
        assert near(tags.most_common(1)[0][1] / tags.total(), rate, tags.total() / 2)


def worlds(animal: str, color: str):
    """All worlds of six individuals, two of each sort: who has the property?"""
    sorts = [{"animals"}, {"animals", animal}, {"animals", animal, color}]
    for wet in product((True, False), repeat=6):
        yield [(sorts[i // 2], wet[i]) for i in range(6)]


def says(words, world) -> bool:
    """The truth of a sentence in a world, word by word."""
    *quantifier, noun, _, _, _ = words
    color = quantifier.pop() if quantifier[-1] in ENGLISH.colors else None
    wet = [w for sorts, w in world if noun in sorts and (color is None or color in sorts)]
    assert wet
    return {
        ("all",): all(wet),
        ("some",): any(wet),
        ("no",): not any(wet),
        ("not", "all"): not all(wet),
    }[tuple(quantifier)]


def test_entailment():
    data = entailment(1500, seed=1)
    for example in data[:300]:
        nouns = [
            w for w in (*example.first, *example.second) if w.removesuffix("s") in ENGLISH.animals
        ]
        colors = [w for w in (*example.first, *example.second) if w in ENGLISH.colors]
        animal, color = (nouns or ["dogs"])[0], (colors or ["black"])[0]
        assert set(nouns) <= {animal}
        assert set(colors) <= {color}
        truths = {
            says(example.second, world)
            for world in worlds(animal, color)
            if says(example.first, world)
        }
        assert example.label == (1 if len(truths) == 2 else 0 if truths == {True} else 2)
        assert example.first != example.second
    for label in range(3):
        assert near(share(example.label == label for example in data), 1 / 3, len(data))


def test_entailment_is_guessed_as_often_as_it_says():
    def best(cue) -> float:
        known: dict[object, Counter] = defaultdict(Counter)
        for hypothesis, by_label in PREMISES.items():
            for label, premises in enumerate(by_label):
                for premise in premises:
                    p = 1 / len(PREMISES) / 3 / len(premises)
                    known[cue(premise, hypothesis)][label] += p
        return sum(max(labels.values()) for labels in known.values())

    def text(form) -> tuple[str, ...]:
        return (*form[0], *GROUPS[form[1]].split())

    assert math.isclose(best(lambda premise, hypothesis: hypothesis), 1 / 3)
    assert round(best(lambda premise, hypothesis: premise), 2) == 0.57
    assert round(best(lambda p, h: tuple(sorted(text(p) + text(h)))), 2) == 0.79
    assert math.isclose(best(lambda premise, hypothesis: (premise, hypothesis)), 1.0)


def fits(first, second) -> bool:
    """Whether a sentence can follow an event: the same thing and pronoun."""
    things = [word for word in second if word in ENGLISH.objects]
    she = first[0] in ENGLISH.women
    pronoun = second[0] if second[0] in ("she", "he") else None
    return things == [first[4]] and pronoun in (None, "she" if she else "he")


def test_next_sentences():
    data = next_sentences(4000, seed=1)
    grammar = story_grammar(1)
    for example in data:
        assert len(split(example.first)) == len(split(example.second)) == 1
        assert not example.label or fits(example.first, example.second)
    for example in data[:100]:
        possible = grammar.log_prob(example.first + example.second) > -math.inf
        assert possible == fits(example.first, example.second)
    labels = [example.label for example in data]
    assert near(share(labels), 0.5, len(data))
    right = share(fits(e.first, e.second) == e.label for e in data)
    assert near(right, next_sentence_optimum(), len(data))
    assert accuracy_word_by_word([e.first for e in data], labels) < 0.54
    assert accuracy_word_by_word([e.second for e in data], labels) < 0.54


def test_next_sentence_optimum_is_the_one_of_bayes():
    """By the probabilities themselves: the better of the two stories, over all pairs."""
    grammar = story_grammar(1, FEW)
    texts = all_texts(grammar)
    first, second = Counter(), Counter()
    for words, p in texts.items():
        first[words[:9]] += p
        second[words[9:]] += p
    right = sum(
        max(texts.get(a + b, 0.0), first[a] * second[b]) / 2 for a, b in product(first, second)
    )
    same_thing = 1 / len(FEW.objects)
    chance = 0.3 * same_thing + 0.7 * same_thing / 2
    assert math.isclose(right, 1 - chance / 2, rel_tol=1e-9)
    assert math.isclose(next_sentence_optimum(), 1 - (0.3 / 12 + 0.7 / 24) / 2)


@pytest.mark.parametrize("n_facts", [1, 2, 5])
def test_questions(n_facts):
    data = questions(900, seed=1, n_facts=n_facts)
    asked = Counter()
    for example in data:
        facts = split(example.context)
        assert len(facts) == n_facts
        match example.question:
            case "where", "was", "the", thing, "?":
                (fact,) = (fact for fact in facts if thing in fact)
                expected = fact[-2:-1]
            case "who", "had", "the", thing, "?":
                (fact,) = (fact for fact in facts if thing in fact)
                expected = fact[:1]
            case "what", "did", name, "have", "?":
                (fact,) = (fact for fact in facts if name in fact)
                expected = fact[3:5]
        assert example.answer == tuple(expected)
        assert example.end - example.start + 1 == len(expected)
        asked[facts.index(fact), example.question[0]] += 1
    assert len(asked) == 3 * n_facts
    for count in asked.values():
        assert near(count / len(data), 1 / (3 * n_facts), len(data))


def test_translations():
    english = {chinese: word for word, chinese in CHINESE.items()}
    english |= {noun: word for word, (_, noun) in CHINESE_OBJECTS.items()}
    assert len(english) == len(CHINESE) + len(CHINESE_OBJECTS)  # no two words share a translation
    for pair in translations(500, seed=1):
        content = [english[word] for word in pair.target if word in english]
        name, verb, _, color, thing, preposition, _, place, _ = pair.source
        assert sorted(content) == sorted([name, verb, color, thing, place])
        i = pair.target.index(CHINESE_OBJECTS[thing][1])
        assert pair.target[i - 4 : i] == ("一", CHINESE_OBJECTS[thing][0], CHINESE[color], "的")
        moved = pair.target[1] == "把"
        assert moved == (preposition == "to") == (verb in ENGLISH.to_a_place)
        assert ("附近" in pair.target) == (preposition == "near")
        assert (pair.target.index(CHINESE[place]) > pair.target.index(CHINESE[verb])) == moved
    event = ("anna", "took", "a", "red", "kite", "to", "the", "park", ".")
    assert " ".join(to_chinese(event)) == "安娜 把 一 只 红色 的 风筝 拿 到 了 公园 。"


def test_back_translation_optimum_by_brute_force():
    sources: Counter = Counter()
    for words, p in story_grammar(0).texts(alike=True):
        sources[words] += p
    by_target: dict[tuple, list[float]] = defaultdict(list)
    for words, p in sources.items():
        by_target[to_chinese(words)].append(p)
    best = sum(max(ps) for ps in by_target.values())
    assert math.isclose(best, back_translation_optimum())
    assert math.isclose(best, 5 / 6)


def test_summaries():
    data = summaries(400, seed=1)
    for pair in data:
        (opinion,) = (s for s in split(pair.source) if "because" in s)
        name, verdict, _, thing, _ = pair.target
        assert name == pair.source[0]
        assert thing in opinion
        assert verdict == ("liked" if set(opinion) & set(ENGLISH.likes) else "hated")
    assert near(share(pair.target[1] == "liked" for pair in data), 0.5, len(data))


def test_the_mixture_says_which_task_it_is():
    data = mixture(800, seed=1)
    tasks = Counter(pair.source[0] for pair in data)
    for task in ("translate", "sentiment", "summarize", "question"):
        assert near(tasks[task] / len(data), 1 / 4, len(data))
    for pair in data:
        task, colon, *source = pair.source
        assert colon == ":"
        if task == "translate":
            assert pair.target == to_chinese(tuple(source))
        elif task == "sentiment":
            assert pair.target in (("positive",), ("negative",))
        elif task == "question":
            assert set(pair.target) <= set(source[5:])


def test_prompts():
    data = prompts(3000, seed=1, n_shots=3)
    animals = BIG + SMALL
    kinds = Counter()
    for prompt in data:
        shown = [*prompt.words, prompt.answer]
        queries, answers = shown[0::4], shown[2::4]
        assert shown[1::4] == ["->"] * 4
        assert shown[3::4] == [","] * 3
        assert len(set(queries)) == 4
        assert set(queries) <= set(animals)
        pairs = list(zip(queries, answers, strict=True))
        if prompt.fresh:
            big = {answer for animal, answer in pairs if animal in BIG}
            small = {answer for animal, answer in pairs if animal in SMALL}
            assert len(big) < 2
            assert len(small) < 2
            assert not big & small
            kinds["fresh"] += 1
        elif all(answer in CHINESE.values() for answer in answers):
            assert all(CHINESE[animal] == answer for animal, answer in pairs)
            kinds["chinese"] += 1
        elif answers == queries:
            kinds["copy"] += 1
        else:
            assert all(a in (q, q + "s") and (a != q or q in ("sheep", "fish")) for q, a in pairs)
            kinds["plural"] += 1
    for kind in ("fresh", "chinese", "plural", "copy"):
        assert near(kinds[kind] / len(data), 1 / 4, len(data))


def test_in_context_optimum_is_what_the_best_guess_gets():
    """The best guess, learned from many prompts instead of from the tasks."""
    for n_shots in (0, 1, 2):
        n = 6000
        right = 0.0
        for prompt in prompts(n, seed=2, n_shots=n_shots):
            right += best_guess(prompt.words) == prompt.answer
        assert near(right / n, in_context_optimum(n_shots), n)
    scores = [in_context_optimum(n_shots) for n_shots in range(6)]
    assert scores == sorted(scores)
    assert math.isclose(
        scores[0], (0.25 * 8 + 0.5 * 2) / 10
    )  # without examples: the likeliest task


def best_guess(words) -> str:
    """By rules of thumb instead of sums: a task that fits, the likeliest one in doubt."""
    *examples, query, _ = words
    shown = dict(zip(examples[0::4], examples[2::4], strict=True))
    own_plural = ("sheep", "fish")
    if not shown or all(q == a and q in own_plural for q, a in shown.items()):
        return query  # copy or plural
    if any(a in ENGLISH.colors for a in shown.values()):
        alike = [a for q, a in shown.items() if (q in BIG) == (query in BIG)]
        return alike[0] if alike else next(c for c in ENGLISH.colors if c not in shown.values())
    if any(a in CHINESE.values() for a in shown.values()):
        return CHINESE[query]
    if all(q == a for q, a in shown.items()):
        return query
    return query if query in own_plural else query + "s"


# --- Vocabulary and errors ------------------------------------------------------------------------


def test_classes_of_words_do_not_overlap():
    words = [word for group in astuple(ENGLISH) for word in group]
    assert len(set(words)) == len(words)


def test_vocabulary_and_batches():
    assert VOCABULARY.words[: len(SPECIALS)] == list(SPECIALS)
    words = stories(1)[0]
    assert VOCABULARY.decode(VOCABULARY.encode(words)) == list(words)
    ids, keep = VOCABULARY.batch([words[:3], words[:5], ()], 6)
    assert ids.shape == keep.shape == (3, 6)
    assert keep.sum(1).tolist() == [3, 5, 0]
    assert VOCABULARY.decode(ids[1][keep[1]]) == list(words[:5])
    assert (ids[~keep] == VOCABULARY.ids["[PAD]"]).all()
    assert VOCABULARY.batch([words])[0].shape == (1, len(words))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"not in the vocabulary of \d+ words: \['zebra'\]"):
        VOCABULARY.encode(["the", "zebra"])
    for wrong in (-1, len(VOCABULARY)):
        with pytest.raises(ValueError, match=rf"ids lie between 0 and \d+, got \[{wrong}\]"):
            VOCABULARY.decode([0, wrong])
    with pytest.raises(ValueError, match="a word appears twice"):
        Vocabulary(["a", "b", "a"])
    with pytest.raises(ValueError, match="at most 2 words, got 1, up to 3"):
        VOCABULARY.batch([("the", "the", "the")], 2)
    with pytest.raises(ValueError, match="at most 0 words, got 0, up to 0"):
        VOCABULARY.batch([])
    with pytest.raises(ValueError, match="no negative number of sentences"):
        story_grammar(-1)
    grammar = story_grammar(0)
    with pytest.raises(ValueError, match="no text begins with 'the park'"):
        grammar.next_words(("the", "park"))
    with pytest.raises(ValueError, match="no text reads 'anna _'"):
        grammar.missing_words(("anna", None))
    with pytest.raises(ValueError, match=r"a rate in \(0, 1\] and at least 2 texts, got 0.0 and 9"):
        grammar.masked_entropy(0.0, 9)
    with pytest.raises(ValueError, match="no word of 2 texts was hidden at rate 1e-09"):
        grammar.masked_entropy(1e-9, 2)
    with pytest.raises(ValueError, match="no rule expands"):
        grammar.rules(("nonsense",))
    with pytest.raises(ValueError, match="expected 1 to 12 facts, got 13"):
        questions(1, n_facts=13)
    for check in (lambda k: prompts(1, n_shots=k), in_context_optimum):
        for n_shots in (-1, 10):
            with pytest.raises(ValueError, match=f"expected 0 to 9 examples .* got {n_shots}"):
                check(n_shots)


def test_draws_follow_their_weights():
    rng = random.Random(0)
    drawn = Counter(draw(rng, "abc", [1.0, 0.0, 3.0]) for _ in range(2000))
    assert drawn["b"] == 0
    assert near(drawn["a"] / 2000, 0.25, 2000)
    coin = Grammar(lambda _: [Rule(0.25, (("a",),)), Rule(0.75, (("b",), ("c", "d")))], (("s",),))
    assert dict(coin.texts()) == {("a",): 0.25, ("b",): 0.375, ("c", "d"): 0.375}
    assert near(share(coin.sample(rng) == ("c", "d") for _ in range(2000)), 0.375, 2000)
