"""Recorded answers to the exercises of `gpt`: right ones written otherwise, and wrong ones.

Wrong answers are what people write; each stands with words of the message that must name it.
"""

import math

import torch
import torch.nn.functional as F

# --- Right answers, written differently --------------------------------------------------------


def log_prob_by_loops(tokens, logits, keep):
    result = []
    for x, z, k in zip(tokens, logits, keep, strict=True):
        total = torch.zeros(())
        for t in range(1, int(k.sum())):
            total = total + z[t - 1, x[t]] - z[t - 1].logsumexp(0)
        result.append(total)
    return torch.stack(result)


def labels_by_rows(tokens, eos_id):
    labels = torch.full((len(tokens), tokens.shape[1] - 1), -100)
    for b, row in enumerate(tokens.tolist()):
        length = row.index(eos_id) + 1 if eos_id in row else len(row)
        labels[b, : length - 1] = tokens[b, 1:length]
    return labels


def windows_by_unfold(stream, N):
    both = stream.unfold(0, N + 1, N)
    return both[:, :-1].clone(), both[:, 1:].clone()


def floor_by_long_run(p, n_tokens):
    """The texts in their proportions, a million of them, token by token."""
    nats = tokens = 0.0
    for share, n in zip(p.tolist(), n_tokens.tolist(), strict=True):
        if share:
            nats += 1e6 * share * -math.log(share)
            tokens += 1e6 * share * n
    return nats / tokens


def block_in_one_expression(x, attention, ffn, norm_1, norm_2):
    T = x.shape[1]
    looks_back = torch.arange(T)[:, None] >= torch.arange(T)
    middle = attention(norm_1(x), looks_back) + x
    return torch.add(middle, ffn(norm_2(middle)))


def count_by_shapes(V, N, L, D):
    block = [(D, D)] * 4 + [(D,)] * 4 + [(D, 4 * D), (4 * D,), (4 * D, D), (D,)] + [(D,)] * 4
    shapes = [(V, D), (N, D), *block * L, (D,), (D,)]
    return sum(math.prod(shape) for shape in shapes)


def work_by_simulation(P, N):
    cached = uncached = in_cache = 0
    length = P
    for _ in range(N):
        cached += length - in_cache
        in_cache = length
        uncached += length
        length += 1
    return [cached, uncached]


def last_by_flip(hidden, keep):
    places = keep.shape[1] - 1 - keep.flip(1).int().argmax(dim=1)
    index = places[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, index).squeeze(1)


def two_losses_by_log_softmax(class_logits, labels, lm_logits, tokens, keep, weight):
    task = -class_logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()
    text = log_prob_by_loops(tokens, lm_logits, keep).sum()
    return task - weight * text / keep[:, 1:].sum()


def guess_by_loops(tasks, prior, shown, said, query, V):
    words = [0.0] * V
    for task, p in zip(tasks.tolist(), prior.tolist(), strict=True):
        examples = zip(shown.tolist(), said.tolist(), strict=True)
        if all(task[question] == answer for question, answer in examples):
            words[task[query]] += p
    return torch.tensor(words) / sum(words)


def score_by_diagonal(weights, P):
    stripe = weights.diagonal(1 - P, dim1=1, dim2=2)  # entry k: query k + P - 1
    return stripe[:, 1:].mean(dim=1)


def rule_by_memory(tokens):
    result = []
    for row in tokens.tolist():
        after, line = {}, []
        for t, token in enumerate(row):
            if t:
                after[row[t - 1]] = token
            line.append(after.get(token, -1))
        result.append(line)
    return torch.tensor(result)


ALTERNATIVES = {
    "text_log_prob": [log_prob_by_loops],
    "labels_with_eos": [labels_by_rows],
    "windows": [windows_by_unfold],
    "lowest_loss": [floor_by_long_run],
    "fix_block": [block_in_one_expression],
    "count_gpt2": [count_by_shapes],
    "cache_work": [work_by_simulation],
    "last_token": [last_by_flip],
    "fine_tuning_loss": [two_losses_by_log_softmax],
    "best_guess": [guess_by_loops],
    "induction_score": [score_by_diagonal],
    "induction_rule": [rule_by_memory],
}


# --- Wrong answers -----------------------------------------------------------------------------


def log_prob_template(logits=slice(None, -1), tokens=slice(1, None), finish=torch.sum):
    def text_log_prob(x, z, keep):
        log_p = z[:, logits].log_softmax(-1)
        said = log_p.gather(-1, x[:, tokens, None])[..., 0]
        return finish(said * keep[:, 1:] if said.shape != x.shape else said * keep, dim=1)

    return text_log_prob


def label_template(hide):
    return lambda x, end: torch.where(hide(x, end), -100, x[:, 1:])


def window_template(length, step):
    def windows(stream, N):
        n = length(N)
        rows = [stream[s : s + n] for s in range(0, len(stream) - n + 1, step(N))]
        rows = torch.stack(rows)
        return rows[:, :-1], rows[:, 1:]

    return windows


def surprise(p):
    return sum(-q * math.log(q) for q in p.tolist() if q)


def mean_length(p, n):
    return sum(q * k for q, k in zip(p.tolist(), n.tolist(), strict=True))


def triangle(x, diagonal=0):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(diagonal)


def block_template(mask=triangle, first=0, second=1):
    def block(x, attention, ffn, *norms):
        x = x + attention(norms[first](x), mask(x))
        return x + ffn(norms[second](x))

    return block


def block_post(x, attention, ffn, norm_1, norm_2):
    x = norm_1(x + attention(x, triangle(x)))
    return norm_2(x + ffn(x))


def block_half_1(x, attention, ffn, norm_1, norm_2):
    x = norm_1(x)
    x = x + attention(x, triangle(x))
    return x + ffn(norm_2(x))


def block_half_2(x, attention, ffn, norm_1, norm_2):
    x = x + attention(norm_1(x), triangle(x))
    return norm_2(x + ffn(x))


def block_parallel(x, attention, ffn, norm_1, norm_2):
    return x + ffn(norm_2(x)) + attention(norm_1(x), triangle(x))


def count_template(more=lambda V, N, L, D: 0, maps=4, ffn=2):
    def count(V, N, L, D):
        attention = maps * (D * D + D)
        up, down = 4 * D * D + 4 * D, 4 * D * D + D
        block = attention + up + (down if ffn == 2 else 0) + 4 * D
        return V * D + N * D + L * block + 2 * D + more(V, N, L, D)

    return count


def two_losses(lm, combine=lambda task, language, w: task + w * language):
    return lambda c, y, z, x, k, w: combine(F.cross_entropy(c, y), lm(z, x, k), w)


def lm_right(z, x, k):
    return F.cross_entropy(z[:, :-1][k[:, 1:]], x[:, 1:][k[:, 1:]])


def lm_by_text(z, x, k):
    rows = [F.cross_entropy(a[:-1][m[1:]], b[1:][m[1:]]) for a, b, m in zip(z, x, k, strict=True)]
    return sum(rows) / len(rows)


def guess_template(fits, normalise=True, use_prior=True):
    def best_guess(tasks, prior, shown, said, query, V):
        p = (prior if use_prior else torch.ones_like(prior)) * fits(tasks[:, shown] == said)
        p = p / p.sum() if normalise else p
        return torch.zeros(V).scatter_add(0, tasks[:, query], p)

    return best_guess


def single_answer(tasks, prior, shown, said, query, V):
    p = prior * (tasks[:, shown] == said).all(1)
    answer = torch.zeros(V)
    answer[tasks[p.argmax(), query]] = 1.0
    return answer


def last_example(tasks, prior, shown, said, query, V):
    return guess_by_loops(tasks, prior, shown[-1:], said[-1:], query, V)


def stripe_template(offset, first=0, finish=torch.mean):
    def score(weights, P):
        queries = torch.arange(P + first, 2 * P)
        return finish(weights[:, queries, queries - P + offset], dim=1)

    return score


def rule_template(choose, shift=1, missing=lambda row: -1):
    def rule(tokens):
        result = torch.empty_like(tokens)
        for b, row in enumerate(tokens.tolist()):
            for t in range(len(row)):
                places = [j for j in range(t) if row[j] == row[t]]
                result[b, t] = row[choose(places) + shift] if places else missing(row)
        return result

    return rule


def rule_by_counts(tokens):
    result = torch.full_like(tokens, -1)
    for b, row in enumerate(tokens.tolist()):
        for t in range(len(row)):
            after = [row[j + 1] for j in range(t) if row[j] == row[t]]
            if after:
                result[b, t] = max(sorted(set(after)), key=after.count)
    return result


def rule_that_looks_ahead(tokens):
    result = rule_by_memory(tokens)
    ahead = tokens.roll(-1, dims=1)
    ahead[:, -1] = tokens[:, -1]
    return ahead.where(result >= 0, result)


WRONG = {
    "text_log_prob": [
        (log_prob_template(slice(None), slice(None)), "the token at the same position"),
        (log_prob_template(slice(1, None), slice(None, -1)), "goes the wrong way"),
        (
            lambda x, z, k: log_prob_by_loops(x, z, torch.ones_like(k)),
            "Padding is counted",
        ),
        (
            lambda x, z, k: log_prob_by_loops(x, z, k) / (k.sum(1) - 1),
            "the mean over the tokens",
        ),
        (lambda x, z, k: -log_prob_by_loops(x, z, k), "The sign is that of a loss"),
        (
            lambda x, z, k: (z[:, :-1].gather(2, x[:, 1:].unsqueeze(2)).squeeze(2) * k[:, 1:]).sum(
                1
            ),
            "without a softmax",
        ),
        (lambda x, z, k: log_prob_by_loops(x, z, k).exp(), "the probability itself"),
        (
            lambda x, z, k: log_prob_by_loops(x[:, 1:], z[:, 1:], k[:, 1:]),
            "The first step is left out",
        ),
    ],
    "labels_with_eos": [
        (label_template(lambda x, end: x[:, 1:] == end), "Every end token is hidden"),
        (lambda x, end: x[:, 1:] + 0, "Nothing is hidden"),
        (
            lambda x, end: x[:, :-1].masked_fill(x[:, :-1] == end, -100),
            "each is the input itself",
        ),
        (
            label_template(lambda x, end: (x == end).int().cumsum(1)[:, 1:] > 2),
            "One label too many",
        ),
        (label_template(lambda x, end: x[:, :-1] != end), "The mask is turned over"),
    ],
    "windows": [
        (window_template(lambda N: N + 1, lambda N: N + 1), "The windows do not overlap"),
        (window_template(lambda N: N + 1, lambda N: 1), "starts at every token"),
        (window_template(lambda N: N, lambda N: N), "one too short"),
        (
            lambda s, N: (
                windows_by_unfold(s, N)[0],
                torch.roll(windows_by_unfold(s, N)[0], -1, 1),
            ),
            "its own first token",
        ),
        (lambda s, N: (windows_by_unfold(s, N)[0],) * 2, "are not shifted"),
        (lambda s, N: windows_by_unfold(s, N)[::-1], "have changed places"),
        (
            lambda s, N: tuple(t[:-1] for t in windows_by_unfold(s, N)),
            "The last whole window is missing",
        ),
    ],
    "lowest_loss": [
        (lambda p, n: surprise(p), "entropy of a whole text"),
        (
            lambda p, n: sum(surprise(q) / k for q, k in zip(p.split(1), n.tolist(), strict=True)),
            "divided by its own length first",
        ),
        (lambda p, n: surprise(p) / n.float().mean().item(), "as if all texts"),
        (lambda p, n: surprise(p) / mean_length(p, n) / math.log(2), "This is in bits"),
        (lambda p, n: surprise(p) / (mean_length(p, n) - 1), "The end token is not counted"),
        (lambda p, n: -surprise(p) / mean_length(p, n), "A loss is not negative"),
        (lambda p, n: math.exp(surprise(p) / mean_length(p, n)), "the perplexity"),
        (lambda p, n: (-(p * torch.log(p)).sum() / (p * n).sum()).item(), "is nan for a computer"),
    ],
    "fix_block": [
        (block_template(mask=lambda x: triangle(x).mT), "the upper triangle, which looks ahead"),
        (block_post, "the wiring of GPT-1"),
        (block_half_1, "first norm still overwrites x"),
        (block_half_2, "second norm still stands after the sum"),
        (block_parallel, "reads the block's input"),
        (block_template(first=1, second=0), "The two norms have changed places"),
        (block_template(mask=lambda x: triangle(x, x.shape[1])), "no mask any more"),
        (block_template(mask=lambda x: triangle(x, -1)), "the diagonal is missing"),
    ],
    "count_gpt2": [
        (count_template(lambda V, N, L, D: V * D), "no table of its own"),
        (count_template(lambda V, N, L, D: -2 * D), "norm after the last block is missing"),
        (count_template(lambda V, N, L, D: -N * D), "position table is missing"),
        (count_template(lambda V, N, L, D: -9 * D * L), "biases of the maps are missing"),
        (lambda V, N, L, D: 12 * L * D**2, "the estimate, not the number"),
        (count_template(ffn=1), "two maps, up and down"),
        (count_template(maps=3), "The attention has four maps"),
        (count_template(lambda V, N, L, D: -(2 * L + 1) * D), "A norm has a gain and a bias"),
        (count_template(lambda V, N, L, D: V), "scores have no bias"),
    ],
    "cache_work": [
        (
            lambda P, N: (P + N, work_by_simulation(P, N + 1)[1]),
            "The last token is counted as read. Nothing",
        ),
        (
            lambda P, N: (P + N, work_by_simulation(P, N)[1]),
            "With a cache: the last token is counted",
        ),
        (lambda P, N: (N, work_by_simulation(P, N)[1]), "the prompt has to be read too"),
        (lambda P, N: (P + N - 1, P * N), "reads more than the prompt"),
        (lambda P, N: (P + N - 1, N * (N + P)), "the whole final text"),
        (
            lambda P, N: (P + N - 1, work_by_simulation(P + 1, N)[1]),
            "it reads P, not P + 1",
        ),
        (lambda P, N: work_by_simulation(P, N)[::-1], "have changed places"),
        (lambda P, N: (N, N), "These are passes"),
    ],
    "last_token": [
        (lambda x, k: x[:, -1, :], "The last column of the batch"),
        (lambda x, k: x[:, 0, :], "where BERT's [CLS] stands"),
        (
            lambda x, k: torch.stack([r[m].mean(0) for r, m in zip(x, k, strict=True)]),
            "mean over the real tokens",
        ),
        (lambda x, k: x.sum(1) / x.shape[1], "mean over all positions"),
        (
            lambda x, k: torch.stack(
                [r[min(int(m.sum()), len(r) - 1)] for r, m in zip(x, k, strict=True)]
            ),
            "One too far",
        ),
        (
            lambda x, k: torch.stack(
                [r[max(int(m.sum()) - 2, 0)] for r, m in zip(x, k, strict=True)]
            ),
            "One too early",
        ),
        (lambda x, k: x[:, k.sum(1).max() - 1], "place of the longest text"),
        (lambda x, k: x[:, k.sum(1) - 1], "every place in every row"),
    ],
    "fine_tuning_loss": [
        (two_losses(lambda z, x, k: lm_right(z, x, k | True)), "Padding counts as a target"),
        (two_losses(lambda z, x, k: F.cross_entropy(z[k], x[k])), "logits are not shifted"),
        (two_losses(lm_right, lambda a, b, w: a + b), "The weight is missing"),
        (two_losses(lm_right, lambda a, b, w: w * a + b), "stands at the task's loss"),
        (two_losses(lm_right, lambda a, b, w: (1 - w) * a + w * b), "(1 - weight) and weight"),
        (two_losses(lm_by_text), "Each text's loss is averaged first"),
        (two_losses(lm_right, lambda a, b, w: a), "the auxiliary one is missing"),
        (
            two_losses(lambda z, x, k: lm_right(z, x, k) * k[:, 1:].sum()),
            "is summed, not averaged",
        ),
    ],
    "best_guess": [
        (guess_template(lambda hits: torch.ones(len(hits))), "The examples are not used"),
        (guess_template(lambda h: h.all(1), use_prior=False), "The prior is not used"),
        (
            guess_template(lambda h: h.any(1) if h.shape[1] else torch.ones(len(h))),
            "fits one example of several",
        ),
        (single_answer, "Only the likeliest task answers"),
        (guess_template(lambda h: h.all(1), normalise=False), "do not add up to 1"),
        (guess_template(lambda h: 1.0 + h.sum(1)), "is out, not just less likely"),
        (last_example, "Only the last example is used"),
    ],
    "induction_score": [
        (stripe_template(0), "the same token before"),
        (lambda w, P: stripe_template(P - 1)(w, P), "weight on the previous token"),
        (stripe_template(2), "the second token after"),
        (stripe_template(1, first=-1), "The first half is counted too"),
        (stripe_template(1, finish=torch.sum), "summed over the queries"),
        (lambda w, P: stripe_template(1, finish=torch.sum)(w, P) / len(w[0]), "by all T queries"),
        (lambda w, P: stripe_template(1)(w.transpose(1, 2), P), "Queries and keys"),
        (lambda w, P: stripe_template(1)(w, P).mean(), "The heads are averaged too"),
    ],
    "induction_rule": [
        (rule_template(min), "the earliest occurrence"),
        (rule_template(max, shift=0), "not the one that followed it"),
        (lambda x: x + 0, "The position itself counts"),
        (rule_by_counts, "followed most often"),
        (rule_that_looks_ahead, "It looks ahead"),
        (rule_template(max, missing=lambda row: row[0]), "the first token instead of -1"),
        (rule_template(max, missing=lambda row: 0), "it returns 0, which is a token"),
    ],
}
