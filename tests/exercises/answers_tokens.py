"""Recorded answers to the exercises of `tokens`: right ones written otherwise, and wrong ones.

Wrong answers are what people write; each stands with words of the message that must name it.
"""

import math
import re
from collections import Counter
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F

# --- Right answers, written differently --------------------------------------------------------


def merge_by_recursion(symbols, pair):
    if len(symbols) < 2:
        return [*symbols]
    if (symbols[0], symbols[1]) == pair:
        return ["".join(pair), *merge_by_recursion(symbols[2:], pair)]
    return [symbols[0], *merge_by_recursion(symbols[1:], pair)]


def merge_by_pattern(symbols, pair):
    """The usual trick with white space around the pair."""
    pattern = re.compile(r"(?<!\S)" + re.escape(" ".join(pair)) + r"(?!\S)")
    return pattern.sub("".join(pair), " ".join(symbols)).split()


def best_pair_by_counter(counts):
    pairs = Counter()
    for word, n in counts.items():
        symbols = word.split()
        for i in range(len(symbols) - 1):
            pairs.update({(symbols[i], symbols[i + 1]): n})
    return pairs.most_common(1)[0][0]


def match_by_while(word, vocab):
    pieces, rest, mark = [], word, ""
    while rest:
        n = len(rest)
        while n and mark + rest[:n] not in vocab:
            n -= 1
        if not n:
            return ["[UNK]"]
        pieces.append(mark + rest[:n])
        rest, mark = rest[n:], "##"
    return pieces


def best_by_recursion(word, scores):
    @cache
    def best(rest):
        if not rest:
            return 0.0
        ends = range(1, len(rest) + 1)
        return max(scores[rest[:n]] + best(rest[n:]) for n in ends if rest[:n] in scores)

    return best(word)


def gradient_by_loop(ids, top, vocab_size):
    gradient = top.new_zeros(vocab_size, top.shape[1])
    for t, i in enumerate(ids.tolist()):
        gradient[i] += top[t]
    return gradient


def gradient_by_index_add(ids, top, vocab_size):
    return torch.zeros(vocab_size, top.shape[1]).index_add(0, ids, top)


def skip_gram_by_softplus(word, context, negatives):
    return F.softplus(-(word @ context)) + F.softplus(negatives @ word).sum()


def products_by_shares(counts, k):
    p = counts / counts.sum()
    return (p / (k * torch.outer(p.sum(1), p.sum(0)))).log()


def analogy_by_loop(vectors, a, b, c):
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    query = unit[c] + unit[b] - unit[a]
    others = [i for i in range(len(vectors)) if i not in (a, b, c)]
    return max(others, key=lambda i: F.cosine_similarity(unit[i], query, dim=0).item())


def perplexity_by_cross_entropy(logits, targets, real):
    return F.cross_entropy(logits[real], targets[real]).exp()


def bits_by_log2(loss, n_tokens, text):
    return math.log2(math.e) * loss * n_tokens / len(bytes(text, "utf8"))


ALTERNATIVES = {
    "merge_pair": [merge_by_recursion, merge_by_pattern],
    "best_pair": [best_pair_by_counter],
    "count_bytes": [[6, 5, 1257], (torch.tensor(6), 5.0, 1257)],
    "longest_match": [match_by_while],
    "best_score": [best_by_recursion],
    "embedding_gradient": [gradient_by_loop, gradient_by_index_add],
    "skip_gram_loss": [skip_gram_by_softplus],
    "best_products": [products_by_shares],
    "analogy": [analogy_by_loop],
    "log_odds": [[1.38629, 0.25, 0.880797], tuple(torch.tensor([1.3863, 0.25, 0.8808]))],
    "fix_perplexity": [perplexity_by_cross_entropy],
    "bits_per_byte": [bits_by_log2],
}


# --- Wrong answers -----------------------------------------------------------------------------


def merge_template(first=False, step=2, same=lambda two, pair: two == pair):
    def merge(symbols, pair):
        out, i, done = [], 0, False
        while i < len(symbols):
            two = tuple(symbols[i : i + 2])
            if len(two) == 2 and same(two, pair) and not (first and done):
                out.append("".join(two))
                i, done = i + step, True
            else:
                out.append(symbols[i])
                i += 1
        return out

    return merge


def merge_from_the_right(symbols, pair):
    turned = merge_template()(symbols[::-1], pair[::-1])
    return ["".join(pair) if part == "".join(pair[::-1]) else part for part in turned[::-1]]


def pairs_template(weigh=True, once=False, across=False, choose=max, turn=False, score=None):
    def best_pair(counts):
        pairs, symbols, last = Counter(), Counter(), None
        for word, n in counts.items():
            for _ in range(n if weigh else 1):
                parts = word.split()
                symbols.update(parts)
                found = list(pairwise(parts))
                if across and last is not None:
                    found.insert(0, (last, parts[0]))
                last = parts[-1]
                pairs.update(found)
        if once:
            pairs = Counter()
            for word, n in counts.items():
                parts = word.split()
                for pair in set(pairwise(parts)):
                    pairs[pair] += n
        value = pairs.get if score is None else lambda pair: score(pairs, symbols, pair)
        best = choose(pairs, key=value)
        return best[::-1] if turn else best

    return best_pair


def match_template(shortest=False, lookup="##", write="##", dead="word"):
    def longest_match(word, vocab):
        pieces, start = [], 0
        while start < len(word):
            ends = range(start + 1, len(word) + 1)
            fits = [e for e in ends if (lookup if start else "") + word[start:e] in vocab]
            if not fits:
                if dead == "word":
                    return ["[UNK]"]
                if dead == "rest":
                    return [*pieces, "[UNK]"]
                pieces, start = [*pieces, "[UNK]"], start + 1
                continue
            end = min(fits) if shortest else max(fits)
            pieces.append((write if start else "") + word[start:end])
            start = end
        return pieces

    return longest_match


def fewest_pieces(word, vocab):
    def cut(rest, mark):
        if not rest:
            return [[]]
        return [
            [mark + rest[:n], *others]
            for n in range(1, len(rest) + 1)
            if mark + rest[:n] in vocab
            for others in cut(rest[n:], "##")
        ]

    return min(cut(word, ""), key=len, default=["[UNK]"])


def all_scores(word, scores):
    """Score and number of pieces of every segmentation."""
    if not word:
        return [(0.0, 0)]
    return [
        (scores[word[:n]] + score, pieces + 1)
        for n in range(1, len(word) + 1)
        if word[:n] in scores
        for score, pieces in all_scores(word[n:], scores)
    ]


def greedy_score(word, scores):
    total = 0.0
    while word:
        n = max(n for n in range(1, len(word) + 1) if word[:n] in scores)
        total, word = total + scores[word[:n]], word[n:]
    return total


def last_wins(ids, top, vocab_size):
    gradient = torch.zeros(vocab_size, top.shape[1])
    for t in range(len(ids)):
        gradient[ids[t]] = top[t]
    return gradient


def first_wins(ids, top, vocab_size):
    gradient, seen = torch.zeros(vocab_size, top.shape[1]), set()
    for t, i in enumerate(ids.tolist()):
        if i not in seen:
            gradient[i] = top[t]
        seen.add(i)
    return gradient


def averaged(ids, top, vocab_size):
    gradient = torch.zeros(vocab_size, top.shape[1])
    for i in ids.unique().tolist():
        gradient[i] = top[ids == i].mean(0)
    return gradient


def by_place(ids, top, vocab_size):
    gradient = torch.zeros(vocab_size, top.shape[1])
    gradient[: len(ids)] = top
    return gradient


def yes(x):
    return torch.log(torch.sigmoid(x))


def analogy_template(scale=True, bar=(0, 1, 2), make=lambda a, b, c: b - a + c, score="cosine"):
    def analogy(vectors, *words):
        x = F.normalize(vectors, dim=1) if scale else vectors
        query = make(*(x[i] for i in words))
        similarity = {
            "cosine": lambda: F.cosine_similarity(x, query[None], dim=1),
            "dot": lambda: x @ query,
            "distance": lambda: -(x - query).norm(dim=1),
        }[score]()
        for i in bar:
            similarity[words[i]] = -torch.inf
        return similarity.argmax().item()

    return analogy


def perplexity_template(dim=2, masked=True, late=True):
    def perplexity(logits, targets, real):
        p = logits.softmax(dim).gather(2, targets.unsqueeze(2)).squeeze(2)
        p = p[real] if masked else p.reshape(-1)
        return torch.exp(-p.log().mean()) if late else (1 / p).mean()

    return perplexity


def perplexity_of_rows(logits, targets, real):
    return torch.stack(
        [
            F.cross_entropy(x[keep], y[keep]).exp()
            for x, y, keep in zip(logits, targets, real, strict=True)
        ]
    ).mean()


def perplexity_over_all(logits, targets, real):
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nll * real.flatten()).mean().exp()


WRONG = {
    "merge_pair": [
        (merge_template(first=True), "Only the first place"),
        (merge_from_the_right, "from right to left"),
        (merge_template(step=1), "right part of the pair is still there"),
        (
            merge_template(same=lambda two, pair: "".join(two) == "".join(pair)),
            "because their text",
        ),
        (merge_template(same=lambda two, pair: set(two) == set(pair)), "the other way round"),
        (lambda symbols, pair: list(symbols), "Nothing is merged"),
    ],
    "best_pair": [
        (pairs_template(weigh=False), "Every word counts once"),
        (pairs_template(once=True), "is counted once there"),
        (pairs_template(across=True), "across the end of a word"),
        (
            pairs_template(score=lambda pairs, one, p: pairs[p] / one[p[0]] / one[p[1]]),
            "scored by association",
        ),
        (pairs_template(choose=min), "the rarest pair"),
        (pairs_template(turn=True), "left and right exchanged"),
    ],
    "count_bytes": [
        ((2, 5, 1257), "Two is the number of characters"),
        ((4, 5, 1257), "UTF-16"),
        ((8, 5, 1257), "UTF-32"),
        ((6, 4, 1257), "é counts as one byte"),
        ((6, 12, 1257), "letters of café are counted alike"),
        ((6, 5, 1001), "Only what training adds"),
        ((6, 5, 1256), "special token is missing"),
        ((6, 5, 1129), "from 0 to 255"),
    ],
    "longest_match": [
        (match_template(shortest=True), "shortest piece is taken first"),
        (match_template(write=""), "returned without ##"),
        (match_template(lookup=""), "looked up without ##"),
        (match_template(lookup="", write=""), "There is no ## anywhere"),
        (match_template(dead="rest"), "before the dead end are kept"),
        (match_template(dead="character"), "becomes [UNK] on its own"),
        (fewest_pieces, "the cut with the fewest pieces"),
    ],
    "best_score": [
        (greedy_score, "the longest piece first"),
        (
            lambda word, scores: math.log(
                math.fsum(math.exp(s) for s, _ in all_scores(word, scores))
            ),
            "the log of the sum over all",
        ),
        (
            lambda word, scores: max(all_scores(word, scores), key=lambda x: (-x[1], x[0]))[0],
            "with the fewest pieces",
        ),
        (lambda word, scores: sum(map(scores.get, word)), "cut into single characters"),
        (lambda word, scores: math.exp(max(all_scores(word, scores))[0]), "This is a probability"),
        (lambda word, scores: min(all_scores(word, scores))[0], "lowest score of all"),
        (
            lambda word, scores: max(s / n for s, n in all_scores(word, scores)),
            "divided by the number of pieces",
        ),
    ],
    "embedding_gradient": [
        (last_wins, "only the last place counts"),
        (first_wins, "only the first place counts"),
        (averaged, "are averaged"),
        (lambda i, t, v: gradient_by_loop(i, t, v) / len(t), "divided by the number of tokens"),
        (lambda i, t, v: t.sum(0).repeat(v, 1), "goes to every row"),
        (by_place, "in the order of the places"),
    ],
    "skip_gram_loss": [
        (lambda w, c, n: -yes(c @ w) - yes(n @ w).sum(), "answered yes as well"),
        (lambda w, c, n: -yes(c @ w) - yes(-n @ w).mean(), "contexts are averaged"),
        (lambda w, c, n: yes(c @ w) + yes(-n @ w).sum(), "A loss is its negative"),
        (
            lambda w, c, n: F.cross_entropy(torch.stack([c, *n]) @ w, torch.tensor(0)),
            "a softmax over the context",
        ),
        (lambda w, c, n: -yes(c @ w), "drawn contexts are missing"),
        (lambda w, c, n: -yes(-c @ w) - yes(n @ w).sum(), "Yes and no are exchanged"),
        (
            lambda w, c, n: -torch.sigmoid(c @ w) - torch.sigmoid(-n @ w).sum(),
            "Probabilities are added",
        ),
        (
            lambda w, c, n: -torch.cat([yes(c @ w)[None], yes(-n @ w)]).mean(),
            "The average over the 1 + K",
        ),
    ],
    "best_products": [
        (lambda x, k: products_by_shares(x, 1), "number of negatives is missing"),
        (lambda x, k: products_by_shares(x, 1) + math.log(k), "log K has the wrong sign"),
        (
            lambda x, k: (x / (k * x.sum(1, keepdim=True) * x.sum(0))).log(),
            "total number of pairs is missing",
        ),
        (lambda x, k: (x / x.sum(1, keepdim=True) / k).log(), "word's frequency alone"),
        (lambda x, k: (x / x.sum() / k).log(), "without what chance would give"),
        (lambda x, k: x.log() - math.log(k), "the log of the raw counts"),
        (lambda x, k: products_by_shares(x, k).exp(), "The logarithm is missing"),
        (lambda x, k: products_by_shares(x, k).sigmoid(), "This is sigmoid(x)"),
        (lambda x, k: products_by_shares(x, k) / math.log(2), "These are bits"),
    ],
    "analogy": [
        (analogy_template(bar=()), "words of the question may win"),
        (analogy_template(bar=(2,)), "Only c is excluded"),
        (analogy_template(make=lambda a, b, c: a - b + c), "The step goes from b to a"),
        (analogy_template(make=lambda a, b, c: a + b - c), "adds a and subtracts c"),
        (analogy_template(scale=False, score="dot"), "Nothing is scaled"),
        (analogy_template(scale=False), "scaled for the comparison only"),
        (analogy_template(scale=False, score="distance"), "Distances between unscaled"),
    ],
    "log_odds": [
        ((4.0, 0.25, 0.8808), "These are the odds"),
        ((-0.2231, 0.25, 0.8808), "log of the probability"),
        ((2.0, 0.25, 0.8808), "the logarithm is natural"),
        ((1.3863, 0.3333, 0.8808), "odds over one plus odds"),
        ((1.3863, 0.75, 0.8808), "sign of the second logit"),
        ((1.3863, 0.25, 0.1192), "probability of the second token"),
        ((1.3863, 0.25, 1.0), "without exponentials first"),
        ((1.3863, 0.25, 7.389), "was not divided by the sum"),
    ],
    "fix_perplexity": [
        (perplexity_template(dim=1), "The softmax still runs over the positions, not over"),
        (perplexity_template(masked=False), "Padding still counts."),
        (perplexity_template(late=False), "The exponential is still taken before the mean."),
        (
            perplexity_template(dim=1, masked=False),
            "over the vocabulary and padding still counts.",
        ),
        (
            perplexity_template(dim=1, late=False),
            "over the vocabulary and the exponential is still",
        ),
        (
            perplexity_template(masked=False, late=False),
            "Padding still counts and the exponential is still",
        ),
        (perplexity_of_rows, "rows' perplexities are averaged"),
        (perplexity_over_all, "divided by all positions"),
        (
            lambda x, y, real: F.cross_entropy(x[real], y[real]),
            "the mean loss. The exponential is missing",
        ),
    ],
    "bits_per_byte": [
        (lambda loss, n, text: loss * n / math.log(2) / len(text), "divided by characters"),
        (lambda loss, n, text: loss * n / len(text.encode()), "These are nats"),
        (lambda loss, n, text: loss * n * math.log(2) / len(text.encode()), "multiplied by ln 2"),
        (lambda loss, n, text: loss / math.log(2) / len(text.encode()), "the loss given is a mean"),
        (lambda loss, n, text: loss / math.log(2), "These are bits per token"),
        (lambda loss, n, text: loss * n / math.log(2) / len(text.split()), "the number of words"),
        (lambda loss, n, text: loss * n / math.log(2), "bits of the whole text"),
    ],
}
