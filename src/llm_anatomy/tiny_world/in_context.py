"""Prompts that show a task by examples, with the score of the best possible guess."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations, permutations

from llm_anatomy.tiny_world.grammar import pick
from llm_anatomy.tiny_world.stories import Words, many
from llm_anatomy.tiny_world.words import CHINESE, ENGLISH, plural

BIG = ("horse", "goat", "pig", "bear", "sheep")
SMALL = ("dog", "cat", "rabbit", "duck", "fish")
Task = dict[str, str]  # from an animal to the answer
FIXED_TASKS: tuple[Task, ...] = (
    {animal: animal for animal in BIG + SMALL},
    {animal: plural(animal) for animal in BIG + SMALL},
    {animal: CHINESE[animal] for animal in BIG + SMALL},
)
# Colours stand for big and small, two others in each prompt: nothing to be learned but in context.
FRESH_TASKS: tuple[Task, ...] = tuple(
    {**dict.fromkeys(BIG, big), **dict.fromkeys(SMALL, small)}
    for big, small in permutations(ENGLISH.colors, 2)
)
TASKS = [(task, 1 / 4) for task in FIXED_TASKS]
TASKS += [(task, 1 / 4 / len(FRESH_TASKS)) for task in FRESH_TASKS]


@dataclass(frozen=True)
class Prompt:
    """Examples of a task that is not named, and a query.

    Attributes:
        words: "dog -> dogs , cat -> cats , horse ->".
        answer: the word that follows.
        fresh: True if the task was made up for this prompt.
    """

    words: Words
    answer: str
    fresh: bool


def prompts(n: int, seed: int = 0, n_shots: int = 3) -> list[Prompt]:
    """Copy, plural, translation, or a colour for big animals and another for small ones.

    The four are equally likely; the colours are drawn anew in each prompt, so the last task cannot
    be known beforehand. The best possible share of right answers is `in_context_optimum(n_shots)`.

    Raises:
        ValueError: the number of examples is negative or leaves no animal for the query.
    """
    _check_shots(n_shots)

    def make(rng: random.Random) -> Prompt:
        kind = pick(rng, range(4))
        task = pick(rng, FRESH_TASKS) if kind == 3 else FIXED_TASKS[kind]
        animals = list(BIG + SMALL)
        shown = [animals.pop(int(rng.random() * len(animals))) for _ in range(n_shots + 1)]
        words: list[str] = []
        for animal in shown[:-1]:
            words += [animal, "->", task[animal], ","]
        return Prompt((*words, shown[-1], "->"), task[shown[-1]], kind == 3)

    return many(n, seed, make)


def in_context_optimum(n_shots: int) -> float:
    """Share of right answers of the best guess, which weighs all tasks that fit the examples.

    Sheep and fish are their own plural, so one example may leave a doubt; and a colour that no
    example has shown can only be guessed.
    """
    _check_shots(n_shots)
    right = total = 0.0
    for shown in combinations(BIG + SMALL, n_shots):
        seen: defaultdict[Words, list[tuple[Task, float]]] = defaultdict(list)
        for task, p in TASKS:
            seen[tuple(task[animal] for animal in shown)].append((task, p))
        for query in (animal for animal in BIG + SMALL if animal not in shown):
            for fitting in seen.values():
                answers: Counter[str] = Counter()
                for task, p in fitting:
                    answers[task[query]] += p
                right += max(answers.values())
            total += 1
    return right / total


def _check_shots(n_shots: int) -> None:
    most = len(BIG + SMALL) - 1
    if not 0 <= n_shots <= most:
        raise ValueError(f"expected 0 to {most} examples in a prompt, got {n_shots}")
