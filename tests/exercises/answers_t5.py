"""Right answers that are built differently, and typical wrong ones, for the chapter on T5."""

import itertools
import math

import torch
import torch.nn.functional as F

# --- Right answers -----------------------------------------------------------------------------


def corrupt_word_by_word(words, spans, sentinels):
    number = {}
    for i, (start, end) in enumerate(spans):
        number.update(dict.fromkeys(range(start, end), i))
    source, target, last = [], [], None
    for at, word in enumerate(words):
        here = number.get(at)
        if here is None:
            source.append(word)
        else:
            if here != last:
                source.append(sentinels[here])
                target.append(sentinels[here])
            target.append(word)
        last = here
    return source, target + sentinels[len(spans) : len(spans) + 1]


def restore_by_index(source, target, sentinels):
    def run(sentinel):
        rest = target[target.index(sentinel) + 1 :]
        return list(itertools.takewhile(lambda word: word not in sentinels, rest))

    return list(
        itertools.chain.from_iterable(
            run(word) if word in sentinels else (word,) for word in source
        )
    )


def attention_by_loops(q, k, v, bias, mask):
    B, H, T, _ = q.shape
    out = torch.zeros_like(q)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        seen = mask[b, 0, t].nonzero().flatten()
        exps = ((k[b, h, seen] * q[b, h, t]).sum(-1) + bias[0, h, t, seen]).exp()
        out[b, h, t] = (exps[:, None] * v[b, h, seen]).sum(0) / exps.sum()
    return out


def logits_by_einsum(x, table, output):
    scaled = x / math.sqrt(x.shape[2])
    x, matrix = (scaled, table) if output is None else (x, output)
    return torch.einsum("btd,vd->btv", x, matrix)


def inputs_by_where(labels, pad_id):
    out = torch.full_like(labels, pad_id)
    out[:, 1:] = torch.where(labels[:, :-1] < 0, pad_id, labels[:, :-1])
    return out


def targets_by_rows(tokens, n_prefix):
    rows = []
    for row, n in zip(tokens.tolist(), n_prefix.tolist(), strict=True):
        rows.append([token if place >= n else -100 for place, token in enumerate(row)][1:])
    return torch.tensor(rows)


def pairs_by_loops(S, T):
    N = S + T
    prefix = sum(k <= q or k < S for q in range(N) for k in range(N))
    causal = sum(k <= q for q in range(N) for k in range(N))
    apart = sum(1 for q in range(S) for k in range(S))
    apart += sum(S + q + 1 for q in range(T))
    return [apart, prefix, causal]


def infill_from_the_end(words, spans, mask):
    damaged = words.copy()
    for start, end in spans[::-1]:
        damaged = [*damaged[:start], mask, *damaged[end:]]
    return damaged, words[:]


def layer_template(mean=False, scale=False, skip=False, gelu=False):
    """T5's encoder layer with einsum, with any of the mistakes left in."""

    def fix_t5_layer(x, bias, w_q, w_k, w_v, w_o, w_up, w_down, gain_1, gain_2, eps):
        H = bias.shape[1]
        E = x.shape[2] // H

        def norm(y, gain):
            y = y - y.mean(2, keepdim=True) if mean else y
            return y / torch.sqrt((y * y).mean(2, keepdim=True) + eps) * gain

        y = norm(x, gain_1)
        q = torch.einsum("btd,dhe->bhte", y, w_q.reshape(-1, H, E))
        k = torch.einsum("btd,dhe->bhte", y, w_k.reshape(-1, H, E))
        v = torch.einsum("btd,dhe->bhte", y, w_v.reshape(-1, H, E))
        scores = torch.einsum("bhte,bhse->bhts", q, k)
        weights = torch.softmax(scores / (math.sqrt(E) if scale else 1) + bias, -1)
        read = torch.einsum("bhts,bhse,hed->btd", weights, v, w_o.reshape(H, E, -1))
        x = read + (y if skip else x)
        wide = norm(x, gain_2) @ w_up
        return x + (F.gelu(wide) if gelu else wide.clamp(min=0)) @ w_down

    return fix_t5_layer


ALTERNATIVES = {
    "corrupt": [corrupt_word_by_word],
    "restore": [restore_by_index],
    "span_lengths": [[77, 26, 462, 105], (77.0, torch.tensor(26), 462, 105)],
    "t5_attention": [attention_by_loops],
    "score_spread": [(0.125, 1, 1, 8), [torch.tensor(1 / 8), 1.0, 1.0, 8.0]],
    "t5_logits": [logits_by_einsum],
    "decoder_inputs": [inputs_by_where],
    "prefix_targets": [targets_by_rows],
    "allowed_pairs": [pairs_by_loops],
    "infill": [infill_from_the_end],
    "small_parameters": [
        [3_146_752, 4_195_840, 512, 60_506_624],
        (torch.tensor(3146752), 4195840.0, 512, torch.tensor(60506624)),
    ],
    "fix_t5_layer": [layer_template()],
}


# --- Wrong answers -----------------------------------------------------------------------------


def corrupt_template(hide=None, tell=None, swapped=False, inclusive=False):
    def corrupt(words, spans, sentinels):
        if inclusive:
            spans = [(start, min(end + 1, len(words))) for start, end in spans]
        source, target = corrupt_word_by_word(words, spans, sentinels)
        if hide is not None:
            pieces, at = [], 0
            for i, (start, end) in enumerate(spans):
                pieces += words[at:start] + hide(i, words[start:end], sentinels)
                at = end
            source = pieces + words[at:]
        if tell is not None:
            target = tell(words, spans, sentinels, target)
        return (target, source) if swapped else (source, target)

    return corrupt


def without_the_rest(words, spans, sentinels):
    source, target = corrupt_word_by_word(words[: spans[-1][1]], spans, sentinels)
    return source, target


def behind(words, spans, sentinels, target):
    out = []
    for (start, end), sentinel in zip(spans, sentinels, strict=False):
        out += [*words[start:end], sentinel]
    return [*out, sentinels[len(spans)]]


def restore_template(pick):
    def restore(source, target, sentinels):
        whole = []
        for word in source:
            if word in sentinels:
                rest = target[target.index(word) + 1 :]
                stop = next((i for i, w in enumerate(rest) if w in sentinels), len(rest))
                whole.extend(pick(word, rest[:stop]))
            else:
                whole.append(word)
        return whole

    return restore


def restore_in_order(source, target, sentinels):
    runs, whole = [], []
    for word in target:
        if word in sentinels:
            runs.append([])
        else:
            runs[-1].append(word)
    for word in source:
        whole += runs.pop(0) if word in sentinels else [word]
    return whole


def attention_template(before=lambda s, E: s, with_bias=torch.add, masked=True, late=False):
    def t5_attention(q, k, v, bias, mask):
        scores = before(torch.einsum("bhte,bhse->bhts", q, k), q.shape[-1])
        scores = scores if late else with_bias(scores, bias)
        if masked:
            scores = torch.where(mask, scores, torch.tensor(-math.inf))
        weights = torch.softmax(scores, -1)
        return (weights + bias * mask if late else weights) @ v

    return t5_attention


def divided_together(q, k, v, bias, mask):
    scores = (torch.einsum("bhte,bhse->bhts", q, k) + bias) / math.sqrt(q.shape[-1])
    return torch.softmax(scores.masked_fill(mask.logical_not(), -math.inf), -1) @ v


def shift(labels, pad, front):
    return torch.hstack((torch.full_like(labels[:, :1], front), labels[:, :-1]))


def filled(labels, pad):
    return torch.where(labels == -100, pad, labels)


def ignore_first(count):
    def prefix_targets(tokens, n_prefix):
        targets = tokens[:, 1:] + 0
        place = torch.arange(targets.shape[1])
        targets[place < count(n_prefix)[:, None]] = -100
        return targets

    return prefix_targets


def self_targets(tokens, n_prefix):
    out = tokens[:, :-1] + 0
    out[torch.arange(out.shape[1]) < n_prefix[:, None]] = -100
    return out


def inside_out(tokens, n_prefix):
    place = torch.arange(1, tokens.shape[1])
    return torch.where(place < n_prefix[:, None], tokens[:, 1:], -100)


def pairs_template(change):
    def allowed_pairs(S, T):
        return change(S, T, *pairs_by_loops(S, T))

    return allowed_pairs


def infill_template(hide=None, tell=None):
    def infill(words, spans, mask):
        damaged, whole = infill_from_the_end(words, spans, mask)
        if hide is not None:
            damaged = list(words)
            for start, end in spans[::-1]:
                damaged[start:end] = hide(words[start:end], mask)
        return damaged, whole if tell is None else tell(words, spans, damaged)

    return infill


ENC, DEC, WHOLE = 3_146_752, 4_195_840, 60_506_624


WRONG = {
    "corrupt": [
        (corrupt_template(swapped=True), "Source and target have changed places"),
        (corrupt_template(hide=lambda i, w, m: [m[i] for _ in w]), "each hidden word gets a"),
        (corrupt_template(hide=lambda i, w, m: [m[i], *w]), "the hidden words as well"),
        (corrupt_template(hide=lambda i, w, m: []), "gone without a trace"),
        (corrupt_template(hide=lambda i, w, m: m[:1]), "all spans get the same sentinel"),
        (without_the_rest, "the words after the last span are missing"),
        (corrupt_template(tell=lambda w, s, m, t: t[:-1]), "the sentinel that ends it"),
        (corrupt_template(tell=lambda w, s, m, t: w[:]), "That is BART's"),
        (corrupt_template(tell=behind), "each sentinel stands behind"),
        (
            corrupt_template(tell=lambda w, s, m, t: [x for x in t if x not in m]),
            "follow each other without sentinels",
        ),
        (corrupt_template(inclusive=True), "`end` is the first word that stays"),
    ],
    "restore": [
        (restore_in_order, "in the order of the target"),
        (restore_template(lambda x, run: [x, *run]), "sentinels are still in the text"),
        (restore_template(lambda x, run: run[:1]), "the first of its span"),
        (restore_template(lambda x, run: run[-1:]), "the last word of its span only"),
        (restore_template(lambda x, run: []), "removed, not replaced"),
        (
            lambda s, t, m: [w for w in s if w not in m] + [w for w in t if w not in m],
            "all at the end",
        ),
        (restore_template(lambda x, run: list(reversed(run))), "in reversed order"),
    ],
    "span_lengths": [
        ((76, 25, 462, 103), "Hidden tokens: 76.8 is rounded down"),
        ((76.8, 25.6, 461.8, 104.4), "or not at all. The nearest integer is asked"),
        ((77, 25, 461, 104), "Spans: the number is rounded down"),
        ((77, 77, 513, 156), "that is the number of hidden tokens"),
        ((77, 26, 461, 105), "the end token is not counted"),
        ((77, 26, 436, 105), "One stands in the place of each span"),
        ((77, 26, 539, 105), "the length of the whole text"),
        ((77, 26, 462, 104), "one token is missing"),
        ((77, 26, 462, 103), "are both missing"),
        ((77, 26, 462, 79), "the sentinels of the spans are not counted"),
    ],
    "t5_attention": [
        (attention_template(before=lambda s, E: s * E**-0.5), "T5 does not do that"),
        (divided_together, "T5 divides neither"),
        (attention_template(with_bias=lambda s, b: s), "The bias is missing"),
        (attention_template(late=True), "added after the softmax"),
        (attention_template(with_bias=torch.mul), "multiplied by the bias"),
        (attention_template(with_bias=torch.sub), "The bias is subtracted"),
        (attention_template(masked=False), "The mask is not used"),
    ],
    "score_spread": [
        ((1 / 64, 1, 1, 64), "These are variances"),
        (((512 * 64) ** -0.5, 1.0, 1.0, 8.0), "standard deviation of one weight"),
        ((1.0, 1.0, 1.0, 8.0), "smaller than those of the keys"),
        ((0.125, 1.0, 0.125, 8.0), "only one is counted"),
        ((0.125, 1.0, 8.0, 8.0), "standard deviations of the products are added"),
        ((0.125, 1.0, 1.0, 64.0), "variances of its products add to E"),
        ((0.125, 1.0, 1.0, 1.0), "Nothing divides it"),
    ],
    "t5_logits": [
        (lambda x, a, b: F.linear(x, a if b is None else b), "factor of version 1.0 is missing"),
        (
            lambda x, a, b: F.linear(x * x.shape[-1] ** -0.5, a if b is None else b),
            "gets the factor too",
        ),
        (
            lambda x, a, b: F.linear(x, a * math.sqrt(x.shape[-1]) if b is None else b),
            "multiplied by the root of D",
        ),
        (
            lambda x, a, b: F.linear(x, a / x.shape[-1] if b is None else b),
            "divided by D, not by its root",
        ),
        (
            lambda x, a, b: F.linear(x, a if b is None else b / x.shape[-1] ** 0.5),
            "The versions have changed places",
        ),
        (lambda x, a, b: F.linear(x / x.shape[-1] ** 0.5, a), "The table is always used"),
    ],
    "decoder_inputs": [
        (lambda y, p: shift(y, p, p), "-100 is still there"),
        (
            lambda y, p: filled(torch.hstack((y[:, 1:], y.new_full((len(y), 1), p))), p),
            "shifted to the left",
        ),
        (lambda y, p: filled(y, p), "The labels are not shifted"),
        (lambda y, p: filled(torch.roll(y, 1, dims=-1), p), "comes round to the front"),
        (lambda y, p: filled(shift(y, p, 0), 0), "Padding is taken to be 0"),
        (
            lambda y, p: torch.hstack((y.new_full((len(y), 1), p), filled(y, p))),
            "one longer than the labels",
        ),
        (lambda y, p: shift(filled(y, p), p, -100), "A column of -100"),
    ],
    "prefix_targets": [
        (ignore_first(lambda n: n), "One target too many is ignored"),
        (ignore_first(lambda n: n - 2), "One target too few is ignored"),
        (ignore_first(lambda n: n * 0), "That is a causal decoder"),
        (self_targets, "each position predicts itself"),
        (ignore_first(lambda n: (n[0] - 1).repeat(len(n))), "the prefix of the first one"),
        (inside_out, "It is the prefix that is predicted"),
    ],
    "allowed_pairs": [
        (pairs_template(lambda S, T, a, p, c: (a - S * T, p, c)), "cross-attention is missing"),
        (
            pairs_template(lambda S, T, a, p, c: (a + T * (T - 1) // 2, p, c)),
            "counted as a full square",
        ),
        (
            pairs_template(lambda S, T, a, p, c: (a - S * (S - 1) // 2, p, c)),
            "the encoder is counted as a triangle",
        ),
        (pairs_template(lambda S, T, a, p, c: (a, (S + T) ** 2, c)), "everything is counted"),
        (pairs_template(lambda S, T, a, p, c: (a, p + S * T, c)), "the source sees the target"),
        (
            pairs_template(lambda S, T, a, p, c: (a - T, p - T, c - S - T)),
            "counted without their diagonal",
        ),
        (pairs_template(lambda S, T, a, p, c: (a, p, T * (T + 1) // 2)), "only the target"),
    ],
    "infill": [
        (infill_template(hide=lambda w, m: [m] * len(w)), "each hidden word gets a mask"),
        (infill_template(hide=lambda w, m: [m] if w else []), "span of length 0 is skipped"),
        (infill_template(hide=lambda w, m: []), "deleted without a mask"),
        (infill_template(hide=lambda w, m: [m, *w]), "masks are inserted, and the words"),
        (
            infill_template(tell=lambda w, s, d: [x for a, b in s for x in w[a:b]]),
            "only the hidden words",
        ),
        (infill_template(tell=lambda w, s, d: d), "as damaged as the source"),
    ],
    "small_parameters": [
        ((ENC + 1024, DEC + 1536, 512, WHOLE + 6 * 2560 + 1024), "counted with a bias"),
        ((ENC + 4608, DEC + 6656, 512, WHOLE + 6 * 11_264), "counted with biases"),
        ((ENC - 1024, DEC - 1536, 512, WHOLE - 6 * 2560), "its two norms are missing"),
        ((ENC + 2**20, DEC + 2**20, 512, WHOLE + 12 * 2**20), "has three"),
        ((ENC, ENC, 512, WHOLE - 6 * (DEC - ENC)), "cross-attention is missing, with its"),
        ((ENC, DEC - 512, 512, WHOLE - 3072), "it has three norms; two are counted"),
        ((ENC, DEC, 3072, WHOLE + 2560), "each layer is given one"),
        ((ENC, DEC, 256, WHOLE - 256), "that is one of them"),
        ((ENC, DEC, 512, WHOLE + 16_449_536), "counts the token table twice"),
        ((ENC, DEC, 512, WHOLE - 1024), "the last norms of the two stacks"),
    ],
    "fix_t5_layer": [
        (layer_template(mean=True), "divides by the root mean square and no more."),
        (layer_template(scale=True), "The scores are divided by the root of E."),
        (layer_template(skip=True), "The stream itself must go on."),
        (layer_template(gelu=True), "that of version 1.0 is a ReLU."),
        (
            layer_template(scale=True, skip=True, gelu=True),
            "The scores are divided by the root of E. The first sum adds",
        ),
        (layer_template(mean=True, gelu=True), "and no more. The feed-forward layer uses GELU"),
    ],
}
