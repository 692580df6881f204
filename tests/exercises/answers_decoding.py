"""Recorded answers to the exercises of `decoding`: right ones written otherwise, and wrong ones.

Wrong answers are what people write; each stands with words of the message that must name it.
"""

import math

import torch
import torch.nn.functional as F

INF = float("inf")

# --- Right answers, written differently --------------------------------------------------------


def softmax_by_powers(logits, tau):
    """The probabilities to the power 1/tau, normalised again."""
    p = logits.double().softmax(dim=-1) ** (1 / tau)
    return (p / p.sum(dim=-1, keepdim=True)).float()


def top_k_by_sorting(logits, k):
    result = torch.full_like(logits, -INF)
    for row, out in zip(logits, result, strict=True):
        kth = sorted(row.tolist(), reverse=True)[min(k, len(row)) - 1]
        for i, z in enumerate(row.tolist()):
            if z >= kth:
                out[i] = z
    return result


def top_p_by_adding(logits, p):
    """Add tokens from the top until p is reached."""
    result = torch.full_like(logits, -INF)
    for row, out in zip(logits.double().softmax(dim=-1).tolist(), result, strict=True):
        total = 0.0
        for i in sorted(range(len(row)), key=lambda i: -row[i]):
            out[i] = 1.0
            total += row[i]
            if total >= p:
                break
    return torch.where(result == 1.0, logits, result)


def min_p_by_softmax(logits, share):
    p = logits.softmax(dim=-1)
    return torch.where(p / p.amax(dim=-1, keepdim=True) >= share, logits, torch.tensor(-INF))


def penalise_by_mask(logits, tokens, theta):
    seen = F.one_hot(tokens, logits.shape[-1]).sum(dim=1) > 0
    return torch.where(seen, torch.minimum(logits / theta, logits * theta), logits)


def banned_by_windows(tokens, n, vocab_size):
    banned = torch.zeros(vocab_size, dtype=torch.bool)
    if len(tokens) >= n:
        windows = tokens.unfold(0, n, 1)
        again = (windows[:, :-1] == tokens[len(tokens) - n + 1 :]).all(dim=1)
        banned[windows[again, -1]] = True
    return banned


def rescore_by_sorting(log_p, lengths, alpha):
    scores = log_p * torch.exp(-alpha * lengths.log())
    return scores.sort(descending=True, stable=True).indices[0]


def beam_step_by_loops(total, log_p):
    W, V = log_p.shape
    rows = [(float(total[w] + log_p[w, v]), w, v) for w in range(W) for v in range(V)]
    rows = sorted(rows, reverse=True)[:W]
    return tuple(torch.tensor(column) for column in zip(*rows, strict=True))


def contrastive_by_torch(p, states, earlier, alpha):
    cosines = F.cosine_similarity(states[:, None], earlier[None], dim=-1)
    return torch.lerp(p, -cosines.max(dim=1).values, alpha)


def pipeline_by_rows(logits, tokens, theta, tau, k, p):
    result = torch.zeros_like(logits)
    for row, said, out in zip(logits, tokens.tolist(), result, strict=True):
        z = row.clone()
        for i in set(said):
            z[i] = min(z[i] / theta, z[i] * theta)
        z = z / tau
        order = z.argsort(descending=True)[:k]
        q = z[order].softmax(dim=0)
        n = 1
        while q[:n].sum() < p:
            n += 1
        out[order[:n]] = q[:n] / q[:n].sum()
    return result


ALTERNATIVES = {
    "softmax_at": [softmax_by_powers],
    "keep_top_k": [top_k_by_sorting],
    "keep_top_p": [top_p_by_adding],
    "keep_min_p": [min_p_by_softmax],
    "fix_pipeline": [pipeline_by_rows],
    "tree_by_hand": [[0.2, 0.27, 0.2], (torch.tensor(0.2), 0.27, 1 / 5)],
    "beam_step": [beam_step_by_loops],
    "rescore": [rescore_by_sorting],
    "penalise": [penalise_by_mask],
    "banned_tokens": [banned_by_windows],
    "contrastive_scores": [contrastive_by_torch],
    "stuck": [[0.729, 9, 99], (torch.tensor(0.729), 9.0, 99.0)],
}


# --- Wrong answers -----------------------------------------------------------------------------


def top_k_template(fill=-INF, largest=True, off=0):
    def keep_top_k(logits, k):
        k = max(min(k + off, logits.shape[-1]), 0)
        kept = logits.topk(k, largest=largest).values
        result = torch.full_like(logits, fill)
        for i, row in enumerate(logits):
            if k:
                keep = row >= kept[i].min() if largest else row <= kept[i].max()
                result[i][keep] = row[keep]
        return result

    return keep_top_k


def top_k_scattered(logits, k):
    values, ids = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -INF).scatter_(1, ids, values)


def top_k_of_the_batch(logits, k):
    kth = logits.flatten().sort(descending=True).values[min(k, logits.shape[1]) - 1]
    return torch.where(logits >= kth, logits, torch.tensor(-INF))


def top_p_template(crossing=True, descending=True, back=True, fill=-INF):
    def keep_top_p(logits, p):
        q, order = torch.sort(logits.softmax(-1), -1, descending=descending)
        total = q.cumsum(-1)
        drop = total - q >= p if crossing else total > p
        if back:
            drop = drop.gather(-1, order.argsort(-1))
        return logits.masked_fill(drop, fill)

    return keep_top_p


def floor_template(floor):
    return lambda z, s: torch.where(z >= floor(z, s), z, torch.tensor(-INF))


def penalty_template(positive, negative, where="seen"):
    def penalise(logits, tokens, theta):
        result = logits.clone()
        for b in range(len(logits)):
            said = tokens[b].tolist()
            ids = {
                "seen": set(said),
                "each": said,
                "unseen": set(range(logits.shape[1])) - set(said),
            }
            for i in ids[where]:
                z = result[b, i]
                result[b, i] = positive(z, theta) if z > 0 else negative(z, theta)
        return result

    return penalise


def divide(z, t):
    return z / t


def multiply(z, t):
    return z * t


def ban_template(window=lambda n: n, pick=lambda found: found, flip=False):
    def banned_tokens(tokens, n, vocab_size):
        n, said = window(n), tokens.tolist()
        context = said[len(said) - n + 1 :]
        found = [
            said[i + n - 1] for i in range(len(said) - n + 1) if said[i : i + n - 1] == context
        ]
        banned = torch.zeros(vocab_size, dtype=torch.bool)
        for token in pick(found):
            banned[token] = True
        return ~banned if flip else banned

    return banned_tokens


def ban_everything(tokens, n, vocab_size):
    return torch.isin(torch.arange(vocab_size), tokens)


def ban_but_not_unigrams(tokens, n, vocab_size):
    if n == 1:
        return torch.zeros(vocab_size, dtype=torch.bool)
    return banned_by_windows(tokens, n, vocab_size)


def step_template(score=lambda t, lp: t[:, None] + lp, by=lambda lp: lp.shape[1], largest=True):
    def beam_step(total, log_p):
        values, i = score(total, log_p).reshape(-1).topk(len(total), largest=largest)
        return values, i // by(log_p), i % by(log_p)

    return beam_step


def step_swapped(total, log_p):
    values, rows, ids = beam_step_by_loops(total, log_p)
    return values, ids, rows


def step_each(total, log_p):
    ids = log_p.argmax(-1)
    return total + log_p.amax(-1), torch.arange(len(ids)), ids


def contrastive_template(reduce="max", cosine=True, weights=lambda a: (1 - a, -a)):
    def contrastive_scores(p, states, earlier, alpha):
        likeness = states @ earlier.mT
        if cosine:
            likeness = likeness / states.norm(dim=1)[:, None] / earlier.norm(dim=1)
        likeness = likeness.max(1).values if reduce == "max" else likeness.mean(1)
        a, b = weights(alpha)
        return a * p + b * likeness

    return contrastive_scores


def pipeline_template(divides=False, crossing=False, late=False):
    def fix_pipeline(logits, tokens, theta, tau, k, p):
        seen = logits.gather(1, tokens)
        weak = seen / theta if divides else torch.minimum(seen / theta, seen * theta)
        z = logits.scatter(1, tokens, weak) / (1 if late else tau)
        z = top_k_template()(z, k)
        q, order = z.softmax(-1).sort(-1, descending=True)
        drop = q.cumsum(-1) > p if crossing else q.cumsum(-1) - q >= p
        drop[:, 0] = False
        z = z.masked_fill(drop.gather(-1, order.argsort(-1)), -INF)
        return (z / (tau if late else 1)).softmax(-1)

    return fix_pipeline


WRONG = {
    "softmax_at": [
        (lambda z, t: F.softmax(z * t, -1), "multiplied by tau"),
        (lambda z, t: F.softmax(z, -1) / t, "no longer sum to one"),
        (lambda z, t: (p := F.softmax(z, -1) / t) / p.sum(-1, True), "has no effect"),
        (lambda z, t: F.softmax(z / t, 0), "runs over the batch"),
        (lambda z, t: torch.log_softmax(z / t, -1), "These are log-probabilities"),
        (lambda z, t: F.softmax(z, -1).pow(1 / t), "without a new normalisation"),
    ],
    "keep_top_k": [
        (top_k_template(fill=0.0), "get the logit 0"),
        (top_k_template(largest=False), "The k smallest are kept"),
        (top_k_template(off=-1), "One token too few"),
        (top_k_template(off=1), "One token too many"),
        (top_k_of_the_batch, "one for the whole batch"),
        (top_k_scattered, "as likely as the k-th are dropped"),
    ],
    "keep_top_p": [
        (top_p_template(crossing=False), "The token that crosses p is dropped"),
        (top_p_template(descending=False), "starts at the least likely"),
        (top_p_template(back=False), "never put back"),
        (lambda z, p: z.masked_fill(z.softmax(-1) < p, -INF), "one by one"),
        (min_p_by_softmax, "This is min-p"),
        (
            lambda z, p: z.masked_fill((q := z.softmax(-1)).cumsum(-1) - q >= p, -INF),
            "in the order of their ids",
        ),
        (top_p_template(fill=0.0), "get the logit 0 here"),
    ],
    "keep_min_p": [
        (floor_template(lambda z, s: (s * z.exp().sum(-1, True)).log()), "absolute threshold"),
        (floor_template(lambda z, s: s * z.max(-1, True).values), "multiplied by the share"),
        (floor_template(lambda z, s: z.max(-1, True).values - s), "share itself is subtracted"),
        (top_p_by_adding, "This is top-p"),
        (floor_template(lambda z, s: z.max() + math.log(s)), "of the whole batch"),
        (
            lambda z, s: z.masked_fill(z >= z.max(-1, True).values + math.log(s), -INF),
            "turned round",
        ),
    ],
    "fix_pipeline": [
        (pipeline_template(divides=True), "divides negative logits as well"),
        (pipeline_template(crossing=True), "drops the token that crosses p."),
        (pipeline_template(late=True), "The temperature comes last"),
        (
            pipeline_template(divides=True, crossing=True),
            "so those tokens gain. Top-p drops",
        ),
        (
            pipeline_template(divides=True, late=True),
            "so those tokens gain. The temperature",
        ),
        (
            pipeline_template(crossing=True, late=True),
            "the token that crosses p. The temperature",
        ),
    ],
    "tree_by_hand": [
        ((0.5 + 0.4, 0.3 + 0.9, 0.2), "Here they are added"),
        ((0.5, 0.27, 0.2), "the first token. The text has two"),
        ((0.4, 0.27, 0.2), "second token given the first"),
        ((0.2, 0.2, 0.2), "finds what greedy finds here"),
        ((0.2, 0.27, 0.27), "The second likeliest is asked for"),
        ((0.2, 0.27, 0.15), "third or fourth"),
    ],
    "beam_step": [
        (step_each, "keeps its own best token"),
        (step_template(lambda t, lp: lp), "totals of the beams are missing"),
        (step_swapped, "are exchanged"),
        (step_template(by=len), "divided by the number of beams"),
        (step_template(lambda t, lp: t[:, None] * lp), "Log-probabilities are multiplied"),
        (step_template(largest=False), "the worst continuations"),
    ],
    "rescore": [
        (lambda p, n, a: int(torch.argmin(p / n.pow(a))), "The smallest score wins here"),
        (lambda p, n, a: int(torch.argmax(p * n.pow(a))), "multiplied by the length"),
        (lambda p, n, a: int(torch.argmax(p)), "has no effect"),
        (lambda p, n, a: int(torch.argmax(p / n)), "whatever alpha is"),
    ],
    "penalise": [
        (penalty_template(divide, divide), "Negative logits are divided as well"),
        (penalty_template(multiply, multiply), "Positive logits are multiplied too"),
        (penalty_template(multiply, divide), "have changed places"),
        (penalty_template(divide, multiply, "each"), "once for each time"),
        (penalty_template(lambda z, t: z - t, lambda z, t: z - t), "It is subtracted"),
        (penalty_template(divide, multiply, "unseen"), "have not occurred are punished"),
    ],
    "banned_tokens": [
        (ban_everything, "whatever n is"),
        (ban_template(window=lambda n: max(n - 1, 1)), "one token too few"),
        (ban_template(window=lambda n: n + 1), "one token too many"),
        (ban_template(pick=lambda found: found[-1:]), "what followed last time"),
        (ban_template(flip=True), "True and False are swapped"),
        (ban_but_not_unigrams, "For n = 1 nothing is banned"),
    ],
    "contrastive_scores": [
        (contrastive_template(reduce="mean"), "The mean likeness"),
        (contrastive_template(cosine=False), "not brought to length one"),
        (contrastive_template(weights=lambda a: (1 - a, a)), "Likeness is rewarded"),
        (contrastive_template(weights=lambda a: (a, a - 1)), "have changed places"),
        (contrastive_template(weights=lambda a: (1, 0)), "The penalty is missing"),
        (contrastive_template(weights=lambda a: (1, -a)), "not weighted with one minus alpha"),
    ],
    "stuck": [
        ((0.9**3 * 0.1, 9, 99), "exactly three repetitions"),
        ((2.7, 9, 99), "not added"),
        ((1 - 0.9**3, 9, 99), "fewer than three"),
        ((0.9**4, 9, 99), "off by one"),
        ((0.9**3, 10, 100), "counts the failure"),
        ((0.9**3, 9, 9.9), "grows far faster"),
    ],
}
