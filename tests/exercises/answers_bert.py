"""Recorded answers to the exercises of `bert`: right ones written otherwise, and wrong ones.

Wrong answers are what people write; each stands with words of the message that must name it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# --- Right answers, written differently --------------------------------------------------------


def pair_from_tensors(a, b, cls, sep):
    tokens = torch.cat([torch.tensor(part) for part in ([cls], a, [sep], b, [sep])])
    return tokens, (torch.arange(len(tokens)) > len(a) + 1).long()


def embed_by_modules(tokens, segments, token_table, position_table, segment_table, gain, bias):
    D = len(gain)
    norm = nn.LayerNorm(D, eps=1e-12)
    norm.load_state_dict({"weight": gain, "bias": bias})
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    tables = (token_table, position_table, segment_table)
    ids = (tokens, places, segments)
    parts = [F.embedding(i, table) for i, table in zip(ids, tables, strict=True)]
    return norm(torch.stack(parts).sum(dim=0)).detach()


def count_by_powers(vocab_size, n_positions, n_segments, n_layers, d_model, d_ff):
    """Sorted by powers of D: squares in attention and the pooler, then rows, then the rest."""
    squares = 1 + 4 * n_layers
    rows = vocab_size + n_positions + n_segments + 3 + n_layers * (2 * d_ff + 4 + 1 + 4)
    return squares * d_model**2 + rows * d_model + n_layers * d_ff


def mask_by_index(tokens, chosen, fate, noise, mask_id):
    inputs, targets = tokens.clone(), tokens.clone()
    targets[~chosen] = -100
    inputs[chosen & (fate < 0.9)] = noise[chosen & (fate < 0.9)]
    inputs[chosen & (fate < 0.8)] = mask_id
    return inputs, targets


def posterior_in_logs(context, seen):
    V = len(context)
    seen_here = F.one_hot(torch.tensor(seen), V)
    return (context.log() + torch.log(0.1 / V + 0.1 * seen_here)).softmax(dim=0)


def nsp_by_distance(follows, random):
    """One half plus a quarter of the mean L1 distance: Σ max(p, q) = 1 + Σ|p - q| / 2."""
    distance = (follows - random).abs().sum(dim=1).mean()
    return float(0.5 + distance / 4)


def spans_backwards(tags):
    """From the right: an I- waits for its beginning."""
    spans, last, kind = [], None, None
    for i in range(len(tags) - 1, -1, -1):
        prefix, name = tags[i][0], tags[i][2:]
        if prefix == "O":
            last = None
        elif prefix == "I":
            if last is None or name != kind:
                last, kind = i, name
        else:
            end = last if last is not None and name == kind else i
            spans.insert(0, (name, i, end))
            last = None
    return spans


def span_by_loops(start, end, context, longest):
    best, found = -math.inf, (0, 0)
    for i in range(len(start)):
        for j in range(i, min(i + longest, len(start))):
            if context[i] and context[j] and start[i] + end[j] > best:
                best, found = start[i] + end[j], (i, j)
    return found


def pll_in_one_table(log_probs, ids, mask_id):
    rows = torch.where(torch.eye(len(ids), dtype=torch.bool), mask_id, ids)
    answers = torch.stack([log_probs(row)[i] for i, row in enumerate(rows)])  # (T, V)
    return -F.nll_loss(answers, ids, reduction="sum").item()


ALTERNATIVES = {
    "input_pair": [pair_from_tensors],
    "embed": [embed_by_modules],
    "count_bert": [count_by_powers],
    "directions": [[3, 6, 4, 6], tuple(torch.tensor([3, 6, 4, 6]))],
    "why_mask": ["B", "(b)"],
    "mask_tokens": [mask_by_index],
    "mask_shares": [[150, 120, 15, 865], (150.0, 120.0, torch.tensor(15.0), 850 + 15)],
    "posterior_of_seen": [posterior_in_logs],
    "nsp_optimum": [nsp_by_distance],
    "entity_spans": [spans_backwards],
    "best_span": [span_by_loops],
    "pseudo_log_likelihood": [pll_in_one_table],
}


# --- Wrong answers -----------------------------------------------------------------------------


def pair_template(front, back, zeros):
    def input_pair(a, b, cls, sep):
        names = {"cls": [cls], "sep": [sep], "a": a, "b": b}
        tokens = [t for name in (front + " " + back).split() for t in names[name]]
        n = zeros(a, b)
        return torch.tensor(tokens), torch.tensor([0] * n + [1] * (len(tokens) - n))

    return input_pair


def embed_template(of):
    def embed(t, s, token_table, position_table, segment_table, gain, bias):
        def norm(x, g=gain, b=bias):
            return F.layer_norm(x, g.shape, g, b, 1e-12)

        places = torch.arange(t.shape[1]).expand_as(t)
        return of(token_table[t], position_table, places, segment_table[s], norm, s)

    return embed


def restarted(a, p, i, c, norm, s):
    first = (s == 0).sum(dim=1, keepdim=True)
    return norm(a + p[torch.where(s == 1, i - first, i)] + c)


def plain(x):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / centred.square().mean(dim=-1, keepdim=True).sqrt()


def count_template(V=1, P=1, S=1, L=1, norm0=2, block_norms=4, bias=1, pooler=1, wide=False):
    def count_bert(v, p, s, n, d, f):
        f = 4 * d if wide else f
        block = 4 * d * d + 2 * d * f + bias * (5 * d + f) + block_norms * d
        total = d * (V * v + P * p + S * s) + norm0 * d
        return total + (n if L else 1) * block + pooler * (d * d + bias * d)

    return count_bert


def mask_template(hide=0.8, swap=0.9, of=lambda old, new, chosen: chosen, values="old", all_=False):
    def mask_tokens(tokens, chosen, fate, noise, mask_id):
        here = torch.ones_like(chosen) if all_ else chosen
        new = tokens.clone()
        new[here & (fate < swap)] = noise[here & (fate < swap)]
        new[here & (fate < hide)] = mask_id
        at = of(fate, new == mask_id, chosen)
        return new, torch.where(at, tokens if values == "old" else new, -100)

    return mask_tokens


def bayes(likelihood, prior=lambda q: q, norm=True):
    def posterior_of_seen(q, seen):
        V = len(q)
        like = torch.tensor([likelihood(w == seen, V) for w in range(V)], dtype=q.dtype)
        joint = prior(q) * like
        return joint / joint.sum() if norm else joint

    return posterior_of_seen


def one_hot(q, seen):
    return torch.eye(len(q))[seen]


def span_template(length=lambda n: n, context=True, order=True, fix=None):
    def best_span(start, end, inside, longest):
        inside = inside if context else torch.ones_like(inside)
        s = start.masked_fill(~inside, -1e9)
        e = end.masked_fill(~inside, -1e9)
        table = s[:, None] + e
        gap = torch.arange(len(s)) - torch.arange(len(s))[:, None]
        table[gap >= length(longest)] = -1e9
        if order:
            table[gap < 0] = -1e9
        if fix == "start":
            i = s.argmax().item()
            return i, table[i].argmax().item()
        if fix == "end":
            j = e.argmax().item()
            return table[:, j].argmax().item(), j
        return tuple(map(int, divmod(table.argmax().item(), len(s))))

    return best_span


def apart(start, end, inside, longest):
    return (
        start.masked_fill(~inside, -1e9).argmax().item(),
        end.masked_fill(~inside, -1e9).argmax().item(),
    )


def pll_template(hide, read=lambda row, token: row[token].item(), over=lambda total, T: total):
    def pseudo_log_likelihood(log_probs, ids, mask_id):
        T, total = len(ids), 0.0
        places = torch.arange(T)
        for t in range(T):
            seen = torch.where(hide(places, t), torch.tensor(mask_id), ids)
            total += read(log_probs(seen)[t], ids[t])
        return over(total, T)

    return pseudo_log_likelihood


def only(places, t):
    return places == t


def tag_template(of):
    return lambda tags: of(list(tags))


def merged(tags):
    spans, kind = [], "O"
    for i, tag in enumerate(tags):
        name = tag[2:]
        if tag != "O" and name == kind:
            spans[-1] = (name, spans[-1][1], i)
        elif tag[0] == "B":
            spans, kind = [*spans, (name, i, i)], name
        else:
            kind = "O"
    return spans


def unfinished(tags):
    spans, begun = [], None
    for i, tag in enumerate(tags):
        if begun and not (tag[0] == "I" and tag[2:] == begun[0]):
            spans.append((*begun, i - 1))
            begun = None
        if tag[0] == "B":
            begun = (tag[2:], i)
    return spans


def with_orphans(tags):
    spans, kind = [], None
    for i, tag in enumerate(tags):
        if tag[0] == "I" and tag[2:] == kind:
            spans[-1] = (kind, spans[-1][1], i)
        elif tag != "O":
            kind = tag[2:]
            spans.append((kind, i, i))
        else:
            kind = None
    return spans


WRONG = {
    "input_pair": [
        (pair_template("cls a sep", "b", lambda a, b: len(a) + 2), "The last separator is missing"),
        (pair_template("cls a", "b sep", lambda a, b: len(a) + 1), "Nothing separates"),
        (pair_template("a sep", "b sep", lambda a, b: len(a) + 1), "[CLS] is missing"),
        (pair_template("cls a sep", "b sep", lambda a, b: len(a) + 1), "so it has segment 0"),
        (pair_template("cls a sep", "b sep", lambda a, b: len(a) + 3), "begins one token late"),
        (pair_template("cls a sep", "b sep", lambda a, b: len(a + b) + 3), "All segments are 0"),
        (
            lambda a, b, c, s: (
                torch.tensor([c, *a, s, *b, s]),
                torch.tensor([1] * (len(a) + 2) + [2] * (len(b) + 1)),
            ),
            "counted from 1",
        ),
    ],
    "embed": [
        (
            embed_template(lambda a, p, i, c, norm, s: norm(a * a.shape[-1] ** 0.5 + p[i] + c)),
            "multiplied by the root of D",
        ),
        (embed_template(lambda a, p, i, c, norm, s: a + p[i] + c), "The sum is not normalised"),
        (embed_template(lambda a, p, i, c, norm, s: norm(a + p[i])), "The segments are missing"),
        (embed_template(lambda a, p, i, c, norm, s: norm(a + c)), "The positions are missing"),
        (embed_template(restarted), "start again in the second segment"),
        (
            embed_template(
                lambda a, p, i, c, norm, s: (
                    norm(a, b=torch.zeros(a.shape[-1]))
                    + norm(p[i], b=torch.zeros(a.shape[-1]))
                    + norm(c)
                )
            ),
            "Each part is normalised before the sum",
        ),
        (embed_template(lambda a, p, i, c, norm, s: norm(a + p[i + 1] + c)), "count from 1"),
        (embed_template(lambda a, p, i, c, norm, s: plain(a + p[i] + c)), "gain and bias are not"),
    ],
    "count_bert": [
        (count_template(pooler=0), "The pooler is missing"),
        (count_template(norm0=0), "norm after the embeddings"),
        (count_template(bias=0), "The biases of the layers"),
        (count_template(block_norms=2), "Here one is counted"),
        (count_template(block_norms=0), "The norms of the blocks are missing"),
        (count_template(S=0), "The segment embeddings are missing"),
        (count_template(P=0), "The position embeddings are missing"),
        (count_template(wide=True), "taken to be four times as wide"),
        (count_template(L=0), "The blocks are counted once"),
    ],
    "directions": [
        ((2, 6, 4, 6), "A causal position sees itself"),
        ((6, 6, 4, 6), "GPT looks to the left only"),
        ((3, 5, 4, 6), "BERT's own position counts"),
        ((3, 3, 4, 6), "BERT has no mask"),
        ((3, 6, 3, 6), "reads the token at its own position"),
        ((3, 6, 6, 6), "starts at the right end"),
        ((3, 6, 4, 7), "counted twice"),
    ],
    "why_mask": [
        ("a", "nothing in attention needs [MASK]"),
        ("c", "Size is no obstacle"),
        ("d", "training needs more steps"),
        ("e", "leave the encoder an encoder"),
    ],
    "mask_tokens": [
        (mask_template(of=lambda fate, masked, chosen: chosen & masked), "Only [MASK] positions"),
        (mask_template(of=lambda fate, masked, chosen: chosen & (fate < 0.9)), "Kept positions"),
        (mask_template(of=lambda fate, masked, chosen: chosen | True), "Every position is a"),
        (mask_template(values="new"), "hold what the model sees"),
        (mask_template(all_=True), "Positions that were not chosen"),
        (mask_template(hide=1.1), "Every chosen token becomes [MASK]"),
        (mask_template(swap=1.1), "20 % of random tokens"),
        (mask_template(swap=0.8), "No token is replaced"),
    ],
    "mask_shares": [
        ((150, 800, 15, 865), "divide the chosen 15 %"),
        ((120, 120, 15, 865), "The tokens asked for are all"),
        ((150, 150, 15, 865), "Only 80 % of them"),
        ((150, 120, 100, 865), "not of all tokens"),
        ((150, 120, 30, 865), "counted together"),
        ((150, 120, 15, 850), "chosen and kept stand unchanged"),
        ((150, 120, 15, 880), "but not unchanged"),
    ],
    "posterior_of_seen": [
        (bayes(lambda hit, V: 0.1 * hit + 0.1 / V, prior=torch.ones_like), "context is not used"),
        (lambda q, seen: q.clone(), "What is seen is not used"),
        (one_hot, "taken for certain"),
        (lambda q, seen: (q + one_hot(q, seen)) / 2, "holds before looking"),
        (bayes(lambda hit, V: 0.8 * hit + 0.1 / V), "80 % is the share of [MASK]"),
        (bayes(lambda hit, V: 0.2 if hit else 0.1), "0.1 / V, not 0.1"),
        (bayes(lambda hit, V: 1.0 if hit else 1 / (V - 1)), "may hit the original"),
        (bayes(lambda hit, V: 0.1 * hit + 0.1 / V, norm=False), "does not sum to 1"),
    ],
    "nsp_optimum": [
        (lambda p, q: 1 - nsp_by_distance(p, q), "the error of the best judge"),
        (lambda p, q: 0.5, "right half of the time"),
        (lambda p, q: 2 * nsp_by_distance(p, q), "The 1/2 is missing"),
        (lambda p, q: len(p) * nsp_by_distance(p, q), "summed over the first sentences"),
        (
            lambda p, q: (torch.maximum(p, q) * (p > 0)).sum().item() / 2 / len(p),
            "can never follow are left out",
        ),
        (
            lambda p, q: torch.where(p > 0, p, q.expand_as(p)).sum().item() / 2 / len(p),
            "whenever it could",
        ),
    ],
    "entity_spans": [
        (tag_template(merged), "of one kind that touch are merged"),
        (tag_template(unfinished), "at the end of the text is lost"),
        (tag_template(with_orphans), "An I- without a beginning"),
        (lambda tags: [(k, i, j + 1) for k, i, j in spans_backwards(tags)], "one too far"),
        (
            lambda tags: [(t.split("-")[1], i, i) for i, t in enumerate(tags) if "-" in t],
            "Each tag is taken alone",
        ),
        (lambda tags: [(k, i, i) for k, i, j in spans_backwards(tags)], "Only the first word"),
    ],
    "best_span": [
        (apart, "chosen on their own"),
        (span_template(context=False), "The context is not respected"),
        (span_template(order=False), "may run backwards"),
        (span_template(fix="start"), "The best start is fixed first"),
        (span_template(fix="end"), "The best end is fixed first"),
        (span_template(length=lambda n: n + 1), "here one more is allowed"),
        (span_template(length=lambda n: 1000), "limit on the length is not applied"),
        (span_template(length=lambda n: 1), "Only spans of one token"),
    ],
    "pseudo_log_likelihood": [
        (pll_template(lambda places, t: places < 0), "Nothing is hidden"),
        (pll_template(lambda places, t: places >= 0), "All tokens are hidden at once"),
        (pll_template(lambda places, t: places >= t), "tokens to the right are hidden"),
        (pll_template(lambda places, t: places <= t), "tokens to the left are hidden"),
        (pll_template(only, over=lambda total, T: total / T), "It is the mean"),
        (pll_template(only, over=lambda total, T: -total), "The sign is turned"),
        (pll_template(only, read=lambda row, token: row.max().item()), "best token's probability"),
    ],
}
