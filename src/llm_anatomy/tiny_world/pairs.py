"""Two texts and their relation: entailment, next sentence, question and answer."""

import random
from dataclasses import dataclass
from itertools import product

from llm_anatomy.tiny_world.grammar import pick
from llm_anatomy.tiny_world.stories import KINDS, STORIES, Words, coin, event, many
from llm_anatomy.tiny_world.words import ENGLISH, plural


@dataclass(frozen=True)
class Pair:
    """Two texts and the class of their relation."""

    first: Words
    second: Words
    label: int


RELATIONS = ("entailment", "neutral", "contradiction")
# A sentence about animals is a quantifier and a group, out of three that lie in one another.
QUANTIFIERS = (("all",), ("some",), ("no",), ("not", "all"))
GROUPS = ("animals", "dogs", "black dogs")
Form = tuple[Words, int]  # the quantifier, and the number of the group
FORMS: tuple[Form, ...] = tuple(product(QUANTIFIERS, range(len(GROUPS))))


def holds(form: Form, wet: tuple[int, ...]) -> bool:
    """Whether a sentence is true in a world.

    Args:
        form: the sentence.
        wet: whether of the black dogs, of the other dogs and of the other animals none (0), some
            (1) or all (2) are wet. There are some of each sort.
    """
    quantifier, group = form
    members = wet[: len(GROUPS) - group]
    match quantifier:
        case ("all",):
            return min(members) == 2
        case ("some",):
            return max(members) > 0
        case ("no",):
            return max(members) == 0
        case _:
            return min(members) < 2


def relation(premise: Form, hypothesis: Form) -> int:
    """Number of the relation in `RELATIONS`, by going through all possible worlds."""
    worlds = [wet for wet in product(range(3), repeat=len(GROUPS)) if holds(premise, wet)]
    truths = {holds(hypothesis, wet) for wet in worlds}
    return 1 if len(truths) == 2 else 0 if truths == {True} else 2


def _premises() -> dict[Form, list[list[Form]]]:
    """For each hypothesis its premises by relation, if it has one for each."""
    found = {}
    for hypothesis in FORMS:
        by_label: list[list[Form]] = [[] for _ in RELATIONS]
        for premise in FORMS:
            if premise != hypothesis:
                by_label[relation(premise, hypothesis)].append(premise)
        if all(by_label):
            found[hypothesis] = by_label
    return found


PREMISES = _premises()


def entailment(n: int, seed: int = 0) -> list[Pair]:
    """Does "all dogs were wet ." imply "some black dogs were wet ."? Labels are `RELATIONS`.

    There are animals of every sort that is named. The three relations are equally likely after each
    hypothesis, so the hypothesis alone is right one time in three. The premise alone is right 57
    times in 100, since a strong premise leaves little open; the words of both without their order
    79 times. At best 1.
    """

    def make(rng: random.Random) -> Pair:
        hypothesis, label = pick(rng, list(PREMISES)), pick(rng, range(len(RELATIONS)))
        premise = pick(rng, PREMISES[hypothesis][label])
        animals, state = plural(pick(rng, ENGLISH.animals)), pick(rng, ENGLISH.states)
        groups = (("animals",), (animals,), (pick(rng, ENGLISH.colors), animals))
        texts = [(*q, *groups[group], "were", state, ".") for q, group in (premise, hypothesis)]
        return Pair(*texts, label)

    return many(n, seed, make)


def next_sentences(n: int, seed: int = 0) -> list[Pair]:
    """The first two sentences of a story (1), or of two different stories (0), half of each.

    Either sentence alone is right half of the time. A foreign sentence may fit by chance, so the
    best possible score is `next_sentence_optimum`.
    """

    def make(rng: random.Random) -> Pair:
        label = coin(rng)
        story, other = (STORIES.sample(rng, (("story", 1),)) for _ in range(2))
        first, second = story[:9], (story if label else other)[9:]
        return Pair(first, second, int(label))

    return many(n, seed, make)


def next_sentence_optimum() -> float:
    """Share of right answers when every second sentence that fits is taken for the true one.

    Nobody can do better: a sentence that fits is always likelier in its own story. It fits if it is
    about the same thing and, unless it only has animals in it, about a person with the same
    pronoun.
    """
    same_thing = 1 / len(ENGLISH.objects)
    fits = KINDS["agreement"] * same_thing + (1 - KINDS["agreement"]) * same_thing / 2
    return 1 - fits / 2


@dataclass(frozen=True)
class Question:
    """A question whose answer is a span of the context.

    Attributes:
        context: some sentences.
        question: the question.
        start: position of the answer's first word in the context.
        end: position of its last word.
    """

    context: Words
    question: Words
    start: int
    end: int

    @property
    def answer(self) -> Words:
        """The words of the answer."""
        return self.context[self.start : self.end + 1]


def questions(n: int, seed: int = 0, n_facts: int = 2) -> list[Question]:
    """Where a thing was, who had it, or what somebody had: the answer is one span.

    The context has `n_facts` sentences about different people and things, and the one that is asked
    about may be any. A model that does not compare question and context answers right one time in
    `n_facts`. At best 1.

    Raises:
        ValueError: there is no fact, or there are more than things to tell apart.
    """
    if not 1 <= n_facts <= len(ENGLISH.objects):
        raise ValueError(f"expected 1 to {len(ENGLISH.objects)} facts, got {n_facts}")

    def make(rng: random.Random) -> Question:
        facts: list[Words] = []
        while len(facts) < n_facts:
            new = event(rng)
            if all(new[0] != fact[0] and new[4] != fact[4] for fact in facts):
                facts.append(new)
        k = pick(rng, range(n_facts))
        name, thing = facts[k][0], facts[k][4]
        question, first, last = pick(
            rng,
            (
                (("where", "was", "the", thing, "?"), 7, 7),
                (("who", "had", "the", thing, "?"), 0, 0),
                (("what", "did", name, "have", "?"), 3, 4),
            ),
        )
        context = tuple(word for fact in facts for word in fact)
        return Question(context, question, 9 * k + first, 9 * k + last)

    return many(n, seed, make)
