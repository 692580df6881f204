"""A text for a text: translation into a small second language, summaries, and several tasks."""

import random
from dataclasses import dataclass

from llm_anatomy.tiny_world.grammar import pick
from llm_anatomy.tiny_world.labels import sentiment
from llm_anatomy.tiny_world.pairs import questions
from llm_anatomy.tiny_world.stories import PREPOSITIONS, STORIES, Words, event, many
from llm_anatomy.tiny_world.words import CHINESE, CHINESE_OBJECTS, ENGLISH


@dataclass(frozen=True)
class TextPair:
    """A source and the target that a model should write."""

    source: Words
    target: Words


def to_chinese(event: Words) -> Words:
    """Translate the opening sentence of a story: the words change, and so does their order.

    A place stands before the verb, or, if the thing is moved there, after it; a thing that is moved
    stands before its verb; and each thing has its own measure word.
    """
    name, verb, _, color, thing, preposition, _, place, _ = event
    measure, noun = CHINESE_OBJECTS[thing]
    what = ("一", measure, CHINESE[color], "的", noun)
    if preposition == "to":
        return (CHINESE[name], "把", *what, CHINESE[verb], "到", "了", CHINESE[place], "。")
    where = (CHINESE[place], "附近") if preposition == "near" else (CHINESE[place],)
    return (CHINESE[name], "在", *where, CHINESE[verb], "了", *what, "。")


def translations(n: int, seed: int = 0) -> list[TextPair]:
    """English sentences and their translation into a little Chinese.

    The translation is a function of the source: at best 1, at a loss of 0 nats. The other way round
    "in" and "at" are one word, and the best possible share of exact matches is
    `back_translation_optimum`.
    """

    def make(rng: random.Random) -> TextPair:
        source = event(rng)
        return TextPair(source, to_chinese(source))

    return many(n, seed, make)


def back_translation_optimum() -> float:
    """Share of exact matches from Chinese to English when "in" or "at" has to be guessed."""
    at, to = len(ENGLISH.at_a_place), len(ENGLISH.to_a_place)
    guessed = at / (at + to) * 2 / len(PREPOSITIONS)
    return 1 - guessed / 2


def summaries(n: int, seed: int = 0) -> list[TextPair]:
    """Stories with one opinion in them, and who liked or hated what, as in "clara liked the kite".

    The summary is a function of the story: at best 1. "liked" stands for all words of liking, so it
    must often be understood, not copied. Without the opinion half of the guesses are right.
    """

    def make(rng: random.Random) -> TextPair:
        story: Words = ()
        while story.count("because") != 1:
            story = STORIES.sample(rng)
        verb = story[story.index("because") - 3]
        verdict = "liked" if verb in ENGLISH.likes else "hated"
        return TextPair(story, (story[0], verdict, "the", story[4], "."))

    return many(n, seed, make)


def mixture(n: int, seed: int = 0) -> list[TextPair]:
    """Four tasks as text, each equally likely, told apart by the first word of the source.

    Translation, sentiment, summary and question (over one fact), in the form of T5 (Raffel et al.,
    2020, arXiv:1910.10683). At best 1 on each.
    """

    def make(rng: random.Random) -> TextPair:
        task = pick(rng, ("translate", "sentiment", "summarize", "question"))
        own_seed = int(rng.random() * 2**53)
        if task == "translate":
            pair = translations(1, own_seed)[0]
        elif task == "summarize":
            pair = summaries(1, own_seed)[0]
        elif task == "sentiment":
            review = sentiment(1, own_seed)[0]
            pair = TextPair(review.words, ("positive" if review.label else "negative",))
        else:
            asked = questions(1, own_seed, n_facts=1)[0]
            pair = TextPair((*asked.question, *asked.context), asked.answer)
        return TextPair((task, ":", *pair.source), pair.target)

    return many(n, seed, make)
