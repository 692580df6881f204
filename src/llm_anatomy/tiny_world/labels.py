"""Sentences with a label, a tag for each word, or positions that belong together.

The truth is known by construction. Where a label could be guessed from a cheap cue, the docstring
says how often the guess is right: a model that scores more has learned more.
"""

import random
from dataclasses import dataclass

from llm_anatomy.tiny_world.grammar import pick
from llm_anatomy.tiny_world.stories import PRONOUN, STORIES, Words, coin, event, many
from llm_anatomy.tiny_world.words import ENGLISH


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    words: Words
    label: int


def sentiment(n: int, seed: int = 0) -> list[Labelled]:
    """Reviews such as "the kite was not new but fine .": 1 where they praise, 0 where they do not.

    `not` stands once in each review, before the word of praise or blame or before the neutral one:
    the words without their order are right half of the time. The order decides: at best 1.
    """

    def make(rng: random.Random) -> Labelled:
        good, negated, neutral_first = coin(rng), coin(rng), coin(rng)
        phrase = ("praise", good, negated, neutral_first)
        review = ("the", ("word", "objects"), "was", phrase, ".")
        return Labelled(STORIES.sample(rng, review), int(good))

    return many(n, seed, make)


@dataclass(frozen=True)
class Bank:
    """A sentence with the word "bank".

    Attributes:
        words: the sentence.
        position: of "bank".
        river: True for the bank of a river, False for one that keeps money.
        cue: position of the verb that tells which.
    """

    words: Words
    position: int
    river: bool
    cue: int

    @property
    def cue_is_left(self) -> bool:
        """Whether a model that reads from left to right has met the cue at "bank"."""
        return self.cue < self.position


def banks(n: int, seed: int = 0) -> list[Bank]:
    """An ambiguous word, its sense given by the verb of its clause: on the left or on the right.

    The other clause has a verb of the other sense, so the words without their order are right half
    of the time, and so is what stands left of "bank" where the cue is on the right. With both sides
    in view: at best 1.
    """

    def make(rng: random.Random) -> Bank:
        river, verb_first = coin(rng), coin(rng)
        symbol = ("bank", coin(rng), pick(rng, ENGLISH.objects), river, verb_first)
        words = STORIES.sample(rng, (symbol,))
        position = words.index("bank")
        return Bank(words, position, river, position - 3 if verb_first else position + 2)

    return many(n, seed, make)


@dataclass(frozen=True)
class Agreement:
    """A sentence whose verb agrees with a subject that is far away.

    Attributes:
        words: the sentence.
        verb: position of "was" or "were".
        subject: position of the noun that the verb agrees with.
        attractor: position of the noun just before the verb.
        many: True if the verb is "were".
        attracts: True if the attractor would have the other verb.
    """

    words: Words
    verb: int
    subject: int
    attractor: int
    many: bool
    attracts: bool


def agreements(n: int, seed: int = 0) -> list[Agreement]:
    """A verb and its subject, with another noun between them: which verb follows?

    The noun just before the verb has the right number half of the time. The words without their
    order are right three times in four: they know the two numbers, not whose they are. At best 1.
    """

    def make(rng: random.Random) -> Agreement:
        many, others = coin(rng), coin(rng)
        symbol = ("agreement", None, pick(rng, ENGLISH.objects), many, others)
        return Agreement(STORIES.sample(rng, (symbol,)), 9, 1, 8, many, many != others)

    return many(n, seed, make)


@dataclass(frozen=True)
class Coreference:
    """A sentence with two names and a pronoun.

    Attributes:
        words: the sentence.
        pronoun: position of "she" or "he".
        antecedent: position of the name that it stands for.
        other: position of the other name.
    """

    words: Words
    pronoun: int
    antecedent: int
    other: int


def coreferences(n: int, seed: int = 0) -> list[Coreference]:
    """Who is meant: "anna met david in the park and he was tired ."?

    One name is a woman's, the other a man's. The nearer name, or the first one, is right half of
    the time. At best 1.
    """

    def make(rng: random.Random) -> Coreference:
        woman, man = pick(rng, ENGLISH.women), pick(rng, ENGLISH.men)
        she_is_first, she_is_meant = coin(rng), coin(rng)
        first, second = (woman, man) if she_is_first else (man, woman)
        place, state = pick(rng, ENGLISH.places), pick(rng, ENGLISH.states)
        ending = ("in", "the", place, "and", PRONOUN[she_is_meant], "was", state, ".")
        first_is_meant = she_is_first == she_is_meant
        positions = (0, 2) if first_is_meant else (2, 0)
        return Coreference((first, "met", second, *ending), 7, *positions)

    return many(n, seed, make)


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@dataclass(frozen=True)
class Tagged:
    """A sentence with one tag for each word: outside, or begin or inside of a person or place."""

    words: Words
    tags: Words


def entities(n: int, seed: int = 0) -> list[Tagged]:
    """Named entities, as in "anna green found a green kite in green park".

    A colour is a surname, an adjective or a part of a place's name; "the park" is no name. Surnames
    and named places come in half of the sentences each. To give each word its commonest tag is
    right for half of the colours and half of the nouns of places. With the words around: at best 1.
    """

    def make(rng: random.Random) -> Tagged:
        name, verb, a, color, thing, preposition, the, place, stop = event(rng)
        tagged = [(name, "B-PER")]
        if coin(rng):
            tagged.append((pick(rng, ENGLISH.colors), "I-PER"))
        tagged += [(word, "O") for word in (verb, a, color, thing, preposition)]
        if coin(rng):
            tagged += [(pick(rng, ENGLISH.colors), "B-LOC"), (place, "I-LOC")]
        else:
            tagged += [(the, "O"), (place, "O")]
        return Tagged(*zip(*tagged, (stop, "O"), strict=True))

    return many(n, seed, make)
