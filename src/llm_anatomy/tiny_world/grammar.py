"""A grammar with probabilities, for which what a language model can only estimate is exact.

A state is what remains to be said: a tuple of words and of symbols that rules expand. Reading a
text means to follow the probability of each state, so next words, missing words and entropies come
out exactly, as in a hidden Markov model. Entropies and losses are in nats.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Symbol = str | tuple  # a word, or a name with arguments that a rule expands
State = tuple[Symbol, ...]
Step = tuple[float, str, State]  # a probability, the word said, the state after it
Beliefs = dict[State, float]


@dataclass(frozen=True)
class Rule:
    """One way to expand a symbol, of probability `weight`, in equally likely variants.

    Variants must be interchangeable: to swap two of them everywhere leaves the probability of every
    text as it is. `cross_entropy` relies on it.
    """

    weight: float
    variants: tuple[State, ...]


@dataclass(frozen=True)
class Entropy:
    """What the best possible model loses, on average.

    Attributes:
        per_text: nats a text.
        n_tokens: predicted tokens a text, on average.
    """

    per_text: float
    n_tokens: float

    @property
    def per_token(self) -> float:
        """Nats a token, over all tokens of many texts: the lowest loss that training can reach."""
        return self.per_text / self.n_tokens


class Grammar:
    """Texts and their probabilities.

    Args:
        rules: the rules of a symbol; their weights sum to one. No text may have two derivations,
            and every derivation must come to an end.
        start: where a text begins.
    """

    def __init__(self, rules: Callable[[tuple], Sequence[Rule]], start: State) -> None:
        self._rules = rules
        self._expanded: dict[tuple, Sequence[Rule]] = {}
        self.start = start
        self._steps: dict[State, list[Step]] = {(): []}
        self._totals: dict[State, tuple[float, float]] = {(): (0.0, 0.0)}
        self._cross: Entropy | None = None

    def rules(self, symbol: tuple) -> Sequence[Rule]:
        """The ways to expand a symbol."""
        if symbol not in self._expanded:
            self._expanded[symbol] = self._rules(symbol)
        return self._expanded[symbol]

    def sample(self, rng: random.Random, start: State | None = None) -> tuple[str, ...]:
        """Draw one text, or what follows from another start."""
        words, state = [], self.start if start is None else start
        while state:
            head, rest = state[0], state[1:]
            if isinstance(head, str):
                words.append(head)
                state = rest
            else:
                rules = self.rules(head)
                rule = draw(rng, rules, [rule.weight for rule in rules])
                state = pick(rng, rule.variants) + rest
        return tuple(words)

    def steps(self, state: State) -> list[Step]:
        """Each possible next word, with its probability and the state after it."""
        if state not in self._steps:
            found: defaultdict[tuple[str, State], float] = defaultdict(float)
            todo = [(1.0, state)]
            while todo:
                p, (head, *rest) = todo.pop()
                if isinstance(head, str):
                    found[head, tuple(rest)] += p
                    continue
                for rule in self.rules(head):
                    share = p * rule.weight / len(rule.variants)
                    todo += [(share, (*variant, *rest)) for variant in rule.variants]
            self._steps[state] = [(p, word, after) for (word, after), p in found.items()]
        return self._steps[state]

    def texts(self, *, alike: bool = False) -> Iterator[tuple[tuple[str, ...], float]]:
        """Every text with its probability; for a full lexicon these are far too many.

        Args:
            alike: of texts that differ only in variants give one, with the probability of all.
        """
        todo: list[tuple[float, tuple[str, ...], State]] = [(1.0, (), self.start)]
        while todo:
            p, words, state = todo.pop()
            if not state:
                yield words, p
                continue
            head, rest = state[0], state[1:]
            if isinstance(head, str):
                todo.append((p, (*words, head), rest))
                continue
            for rule in self.rules(head):
                variants = rule.variants[:1] if alike else rule.variants
                share = p * rule.weight / len(variants)
                todo += [(share, words, variant + rest) for variant in variants]

    # What a model that reads from left to right can know

    def _read(self, words: Sequence[str | None]) -> list[Beliefs]:
        """Probability of each state and of the words so far, before each word and at the end."""
        beliefs = [{self.start: 1.0}]
        for word in words:
            new: defaultdict[State, float] = defaultdict(float)
            for state, weight in beliefs[-1].items():
                for p, said, after in self.steps(state):
                    if word is None or said == word:
                        new[after] += weight * p
            beliefs.append(dict(new))
        return beliefs

    def log_prob(self, words: Sequence[str | None]) -> float:
        """Log-probability of a whole text, minus infinity if it cannot be; None is any word."""
        p = self._read(words)[-1].get((), 0.0)
        return math.log(p) if p > 0 else -math.inf

    def next_words(self, prefix: Sequence[str], end: str = "[EOS]") -> dict[str, float]:
        """Probability of each word after a prefix, and of the text's end as `end`.

        Raises:
            ValueError: no text begins like this.
        """
        states = self._read(prefix)[-1]
        total = sum(states.values())
        if not total:
            raise ValueError(f"no text begins with {' '.join(prefix)!r}")
        found: defaultdict[str, float] = defaultdict(float)
        for state, weight in states.items():
            for p, word, _ in self.steps(state) if state else [(1.0, end, ())]:
                found[word] += weight / total * p
        return dict(found)

    def entropy(self) -> Entropy:
        """Of the next token, the end of the text included, given all before it. Exact."""
        per_text, length = self._total(self.start)
        return Entropy(per_text, length + 1)

    def _total(self, state: State) -> tuple[float, float]:
        """Expected nats and words from here on. The chain rule, since derivations are unique."""
        if state not in self._totals:
            nats = length = 0.0
            for p, _, after in self.steps(state):
                more_nats, more_length = self._total(after)
                nats += p * (more_nats - math.log(p))
                length += p * (more_length + 1)
            self._totals[state] = nats, length
        return self._totals[state]

    # What a model that sees both sides can know

    def missing_words(self, words: Sequence[str | None]) -> list[dict[str, float]]:
        """At each position: probability of each word given the length and all other words.

        A None is a word that nobody sees; several may be missing at once.

        Raises:
            ValueError: there is no such text.
        """
        before = self._read(words)
        # At each position the states that any one word, changed before it, would lead to.
        reach: list[dict[State, list[Step]]] = [{self.start: self.steps(self.start)}]
        for word, sure in zip(words, before, strict=False):
            afters = [
                after
                for state, steps in reach[-1].items()
                for _, said, after in steps
                if word in (None, said) or state in sure
            ]
            reach.append({state: self.steps(state) for state in afters})
        rest: Beliefs = {(): 1.0}  # probability of the words after a position, given the state
        found: list[dict[str, float]] = []
        for position in reversed(range(len(words))):
            here: Beliefs = {}
            said_here: defaultdict[str, float] = defaultdict(float)
            for state, steps in reach[position].items():
                weight = before[position].get(state, 0.0)
                for p, word, after in steps:
                    if after in rest:
                        share = p * rest[after]
                        if weight:
                            said_here[word] += weight * share
                        if words[position] in (None, word):
                            here[state] = here.get(state, 0.0) + share
            rest = here
            total = sum(said_here.values())
            found.append({word: p / total for word, p in said_here.items()})
        if self.start not in rest:
            raise ValueError(f"no text reads {' '.join(word or '_' for word in words)!r}")
        return found[::-1]

    def cross_entropy(self) -> Entropy:
        """Of one hidden word, given the length and all words on both sides of it. Exact.

        This is the lowest loss of a masked language model that hides one word at a time. It sums
        over all texts; of texts that are alike it looks at one. (Some seconds for full stories.)
        """
        if self._cross is not None:
            return self._cross
        nats = length = 0.0
        for words, p in self.texts(alike=True):
            for word, q in zip(words, self.missing_words(words), strict=True):
                nats -= p * math.log(q[word])
            length += p * len(words)
        self._cross = Entropy(nats, length)
        return self._cross

    def masked_entropy(self, rate: float, n: int, seed: int = 0) -> tuple[float, float]:
        """Of a hidden word where each word is hidden with probability `rate`, several at once.

        There are too many patterns to sum over, so texts and patterns are drawn; for each the
        entropy of the hidden words is exact.

        Returns:
            The mean, in nats a hidden word, and its standard error: for about 95 of 100 seeds the
            truth lies within two of them.

        Raises:
            ValueError: the rate is not between 0 and 1, fewer than two texts are asked for, or no
                word happened to be hidden.
        """
        if not 0 < rate <= 1 or n < 2:
            raise ValueError(f"expected a rate in (0, 1] and at least 2 texts, got {rate} and {n}")
        rng = random.Random(seed)
        nats, hidden = [], []
        for _ in range(n):
            words = [None if rng.random() < rate else word for word in self.sample(rng)]
            qs = [q for q, w in zip(self.missing_words(words), words, strict=True) if w is None]
            nats.append(-sum(p * math.log(p) for q in qs for p in q.values()))
            hidden.append(len(qs))
        if not any(hidden):
            raise ValueError(f"no word of {n} texts was hidden at rate {rate}: ask for more texts")
        mean = sum(nats) / sum(hidden)
        spread = sum((a - mean * b) ** 2 for a, b in zip(nats, hidden, strict=True))
        return mean, math.sqrt(spread * n / (n - 1)) / sum(hidden)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items, all equally likely; the same for a seed in every version of Python."""
    return items[int(rng.random() * len(items))]


def draw(rng: random.Random, items: Sequence[T], weights: Sequence[float]) -> T:
    """One of the items, with probabilities proportional to the weights."""
    left = rng.random() * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        left -= weight
        if left < 0:
            return item
    return items[-1]
