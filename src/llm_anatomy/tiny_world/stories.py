"""The corpus: short stories about a person and a thing.

    clara found a red kite in the park . she loved the kite because it was not new but fine .

A story opens with an event, and each further sentence is one of three kinds. What matters in them
hangs on the order of the words, not on how often each occurs:

* an opinion, where `not` may stand before the word of praise or before a neutral one;
* a bank, of a river or for money, as the verb of its own clause says, on its left or on its right,
  while the other clause has a verb of the other sense;
* a subject and its verb that agree over a distance, with another noun in between.

Who the story is about decides on `she` or `he`, and the thing stays the same.
"""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from llm_anatomy.tiny_world.grammar import Grammar, Rule, State
from llm_anatomy.tiny_world.words import ENGLISH, Lexicon, plural

Words = tuple[str, ...]
Data = TypeVar("Data")
KINDS = {"opinion": 0.4, "bank": 0.3, "agreement": 0.3}
PREPOSITIONS = ("in", "at", "near")
YES_NO = (True, False)
PRONOUN = {True: "she", False: "he"}


def story_grammar(n_more: int = 2, lexicon: Lexicon = ENGLISH) -> Grammar:
    """The stories of an event and `n_more` sentences after it.

    Raises:
        ValueError: `n_more` is negative.
    """
    if n_more < 0:
        raise ValueError(f"a story has no negative number of sentences, got n_more {n_more}")

    def rules(symbol: tuple) -> Sequence[Rule]:
        return expand(symbol, lexicon)

    return Grammar(rules, (("story", n_more),))


def stories(n: int, seed: int = 0, n_more: int = 2) -> list[Words]:
    """Draw stories as words. Their probabilities and entropies are those of `story_grammar`."""
    return many(n, seed, story_grammar(n_more).sample)


def expand(symbol: tuple, lexicon: Lexicon) -> Sequence[Rule]:
    """The rules of the grammar, the whole of it.

    A symbol with True or False in it is a sentence whose truth is settled before its words are:
    the labelled data start from these.
    """
    match symbol:
        case "story", n_more:
            return [
                Rule(0.5, tuple((name, ("event", she, n_more)) for name in names))
                for she, names in ((True, lexicon.women), (False, lexicon.men))
            ]
        case "event", she, n_more:
            to, at = len(lexicon.to_a_place), len(lexicon.at_a_place)
            ways = [("to", lexicon.to_a_place, to / (to + at))]
            ways += [(p, lexicon.at_a_place, at / (to + at) / 3) for p in PREPOSITIONS]
            return [
                Rule(
                    weight,
                    tuple(
                        (verb, "a", ("word", "colors"), ("thing", she, preposition, n_more))
                        for verb in verbs
                    ),
                )
                for preposition, verbs, weight in ways
            ]
        case "thing", she, preposition, n_more:
            return [
                Rule(
                    1.0,
                    tuple(
                        (
                            thing, preposition, "the", ("word", "places"), ".",
                            *[("more", she, thing)] * n_more,
                        )
                        for thing in lexicon.objects
                    ),
                )
            ]  # fmt: skip
        case "word", name:
            return [Rule(1.0, tuple((word,) for word in getattr(lexicon, name)))]
        case "more", she, thing:
            return [Rule(weight, (((kind, she, thing),),)) for kind, weight in KINDS.items()]
        case "opinion", she, thing:
            return _choices(("opinion", she, thing), 3)
        case "opinion", she, thing, likes, negated, neutral_first:
            verb = ("word", "likes" if likes else "hates")
            praise = ("praise", likes, negated, neutral_first)
            return _one(PRONOUN[she], verb, "the", thing, "because", "it", "was", praise, ".")
        case "praise", positive, negated, neutral_first:
            judged: State = (("word", "good" if positive != negated else "bad"),)
            neutral: State = (("word", "neutral"),)
            if negated:
                judged = ("not", *judged)
            else:
                neutral = ("not", *neutral)
            first, second = (neutral, judged) if neutral_first else (judged, neutral)
            return _one(*first, "but", *second)
        case "bank", she, thing:
            return _choices(("bank", she, thing), 2)
        case "bank", she, thing, river, verb_first:
            here, there = ("water", "money") if river else ("money", "water")
            who: State = (PRONOUN[she], ("word", here))
            where: State = ("at", "the", "bank")
            clause = who + where if verb_first else where + who
            other: State = (PRONOUN[not she], ("word", there))
            return _one(PRONOUN[she], "left", "the", thing, "and", *clause, "while", *other, ".")
        case "agreement", _, thing:
            return _choices(("agreement", None, thing), 2)
        case "agreement", _, thing, many, others:
            relative: State = ("that", "saw", "the", thing, "near", "the", ("animal", others))
            verb = "were" if many else "was"
            return _one("the", ("animal", many), *relative, verb, ("word", "states"), ".")
        case "animal", many:
            animals = map(plural, lexicon.animals) if many else lexicon.animals
            return [Rule(1.0, tuple((animal,) for animal in animals))]
    raise ValueError(f"no rule expands {symbol!r}")


def _one(*symbols: str | tuple) -> Sequence[Rule]:
    return [Rule(1.0, (symbols,))]


def _choices(symbol: tuple, n: int) -> Sequence[Rule]:
    """Add n fair choices between True and False to a symbol."""
    chosen = [symbol]
    for _ in range(n):
        chosen = [(*s, choice) for s in chosen for choice in YES_NO]
    return [Rule(1 / len(chosen), ((s,),)) for s in chosen]


# --- What the labelled data are made with ---------------------------------------------------------

STORIES = story_grammar()


def many(n: int, seed: int, make: Callable[[random.Random], Data]) -> list[Data]:
    """Draw n examples.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"expected at least one example, got n {n}")
    rng = random.Random(seed)
    return [make(rng) for _ in range(n)]


def coin(rng: random.Random) -> bool:
    """True or False, equally likely."""
    return rng.random() < 0.5


def event(rng: random.Random) -> Words:
    """An opening sentence: name, verb, a, colour, thing, preposition, the, place, full stop."""
    return STORIES.sample(rng, (("story", 0),))
