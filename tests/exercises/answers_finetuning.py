"""Right answers that are built differently, and typical wrong ones: the chapter on fine-tuning."""

import math

import torch

# --- Right answers -----------------------------------------------------------------------------


def rate_by_interpolation(step, n_steps, peak, warmup):
    up = step / warmup if warmup else math.inf
    return peak * min(up, (n_steps - step) / (n_steps - warmup))


def rates_from_the_top(peak, n_layers, decay):
    rates = [peak]
    while len(rates) < n_layers:
        rates.insert(0, rates[0] * decay)
    return rates


def layers_by_loop(step, n_layers, every):
    on = [False] * n_layers
    for i in range(n_layers):
        if step > i * every:
            on[-1 - i] = True
    return on


def labels_by_set(owners, tags):
    seen, out = set(), []
    for owner in owners:
        if owner is None or owner in seen:
            out += [-100]
        else:
            out += [tags[owner]]
            seen.add(owner)
    return out


def loss_by_loops(logits, labels):
    total, n = torch.zeros(()), 0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if labels[b, t] != -100:
                total = total + logits[b, t].logsumexp(0) - logits[b, t, labels[b, t]]
                n += 1
    return total / n


def epoch_by_sorting(development, test):
    rows = [(-score, i) for i, score in enumerate(development)]
    return sorted(rows)[0][1] + 1, test[sorted(rows)[0][1]]


def rates_by_tensor(sizes, limit):
    parts = torch.tensor(sizes, dtype=torch.float64).clamp(max=limit)
    return (parts / parts.sum()).tolist()


def move_by_matrix(x, gradient, rate):
    return -rate * torch.outer(gradient, x).sign() @ x


def step_template(padding=False, total=False, melted=False, swapped=False):
    """A step by autograd, with any of the mistakes left in."""

    def fix_tune_step(body, head, x, labels, rate, body_scale, frozen):
        a, b = body.clone().requires_grad_(), head.clone().requires_grad_()
        log_p = ((x @ a).tanh() @ b).log_softmax(1)
        counted = torch.ones(len(x)) if padding else (labels != -100).float()
        picked = log_p[torch.arange(len(x)), labels.clamp(min=0)] * counted
        loss = -picked.sum() if total else -picked.sum() / counted.sum()
        of_a, of_b = torch.autograd.grad(loss, (a, b))
        small, full = (1.0, body_scale) if swapped else (body_scale, 1.0)
        new = body if frozen and not melted else body - rate * small * of_a
        return new, head - rate * full * of_b

    return fix_tune_step


NEW, POOLED, LAST, ALL = 1538, 592_130, 7_680_002, 109_483_778

ALTERNATIVES = {
    "steps_of_epochs": [[115, 345, 34], (115.0, torch.tensor(345), 34)],
    "linear_warmup": [rate_by_interpolation],
    "layer_rates": [rates_from_the_top],
    "learning_layers": [layers_by_loop],
    "word_labels": [labels_by_set],
    "tagging_loss": [loss_by_loops],
    "best_epoch": [epoch_by_sorting],
    "trainable_counts": [[NEW, POOLED, LAST, ALL], (1538.0, POOLED, torch.tensor(LAST), ALL)],
    "mixture_rates": [rates_by_tensor],
    "adam_move": [move_by_matrix],
    "num_labels_after": ["C", " (c) "],
    "fix_tune_step": [step_template()],
}


# --- Wrong answers -----------------------------------------------------------------------------


def warmup_template(up=lambda s, w: s / w, down=lambda s, n, w: (n - s) / (n - w), scaled=True):
    def linear_warmup(step, n_steps, peak, warmup):
        share = up(step, warmup) if step <= warmup else down(step, n_steps, warmup)
        return share * peak if scaled else share

    return linear_warmup


def half_cosine(s, n, w):
    return (1 + math.cos((s - w) / (n - w) * math.pi)) / 2


def rates_template(change):
    def layer_rates(peak, n_layers, decay):
        return change(rates_from_the_top(peak, n_layers, decay), peak, n_layers, decay)

    return layer_rates


def thaw_template(count=lambda s, e: -(-s // e), change=lambda on: on):
    def learning_layers(step, n_layers, every):
        n = min(n_layers, count(step, every))
        return change([i + n >= n_layers for i in range(n_layers)])

    return learning_layers


def newest_alone(on):
    first = on.index(True)
    return [i == first for i in range(len(on))]


def labels_template(later=-100, special=-100):
    def word_labels(owners, tags):
        out, before = [], None
        for owner in owners:
            if owner is None:
                out.append(special)
            elif owner == before:
                out.append(tags[owner] if later == "tag" else later)
            else:
                out.append(tags[owner])
            before = owner
        return out

    return word_labels


def labels_at_the_end(owners, tags):
    return labels_template()(owners[::-1], tags)[::-1]


def tagging_template(reduce, fill=0):
    def tagging_loss(logits, labels):
        known = labels.where(labels >= 0, torch.tensor(fill if fill >= 0 else logits.shape[-1] - 1))
        nats = -logits.log_softmax(-1).gather(-1, known[..., None]).squeeze(-1)
        return reduce(nats, (labels != -100).float())

    return tagging_loss


def epoch_template(choose, report):
    def best_epoch(development, test):
        i = choose(development, test)
        return i + 1, report(i, development, test)

    return best_epoch


def top(scores):
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def latest_top(scores):
    return max(range(len(scores)), key=lambda i: (scores[i], i))


def from_zero(development, test):
    return top(development), test[top(development)]


WRONG = {
    "steps_of_epochs": [
        ((114, 342, 34), "the last, smaller batch was dropped"),
        ((114.625, 343.875, 34), "a fraction. A step is a whole batch"),
        ((3668, 11_004, 1100), "those are the pairs"),
        ((115, 115, 11), "Steps in all: that is one epoch"),
        ((115, 344, 34), "joined over the epochs"),
        ((115, 345, 11), "a tenth of one epoch"),
        ((115, 345, 35), "not rounded down"),
    ],
    "linear_warmup": [
        (warmup_template(up=lambda s, w: (s - 1) / w), "its first step changes nothing"),
        (warmup_template(down=lambda s, n, w: 1), "It never falls"),
        (warmup_template(down=lambda s, n, w: 1 - s / n), "jumps down where"),
        (warmup_template(down=half_cosine), "That is the cosine of the chapter"),
        (warmup_template(up=lambda s, w: 1), "There is no warm-up"),
        (warmup_template(scaled=False), "not yet a rate"),
        (warmup_template(down=lambda s, n, w: (n + 1 - s) / (n - w)), "It never reaches 0"),
    ],
    "layer_rates": [
        (rates_template(lambda r, p, n, d: r[::-1]), "The order is reversed"),
        (rates_template(lambda r, p, n, d: [x * d for x in r]), "is slowed down as well"),
        (rates_template(lambda r, p, n, d: [p * d] * (n - 1) + [p]), "have the same rate"),
        (rates_template(lambda r, p, n, d: [p * p / x for x in r]), "Divided where it should"),
        (
            rates_template(lambda r, p, n, d: [p / n * i for i in range(1, n + 1)]),
            "fall by equal differences",
        ),
        (rates_template(lambda r, p, n, d: [p for _ in r]), "All layers have the peak"),
    ],
    "learning_layers": [
        (thaw_template(change=lambda on: on[::-1]), "The order is reversed"),
        (thaw_template(change=newest_alone), "Only the layer that has just thawed"),
        (thaw_template(count=lambda s, e: s // e + 1), "in the last step of the old period"),
        (thaw_template(count=lambda s, e: (s - 1) // e), "Nothing learns in the first period"),
        (thaw_template(count=lambda s, e: 99), "All layers learn from the start"),
        (thaw_template(change=lambda on: [not x for x in on]), "which layers are frozen"),
    ],
    "word_labels": [
        (labels_template(later="tag"), "Every token of a word has the tag"),
        (labels_at_the_end, "The last token of a word carries its tag"),
        (labels_template(special=0), "trained as a class of their own"),
        (labels_template(later=0), "that of one of the classes"),
        (labels_template(later=0, special=0), "all of them would count"),
        (lambda owners, tags: [*tags], "one label a token is needed"),
    ],
    "tagging_loss": [
        (tagging_template(lambda x, on: x.mean()), "as if its label were the first class"),
        (tagging_template(lambda x, on: x.mean(), fill=-1), "-100 was used as an index"),
        (tagging_template(lambda x, on: (x * on).mean()), "divided by all positions"),
        (tagging_template(lambda x, on: (x * on).sum()), "the sum over the tokens"),
        (
            tagging_template(lambda x, on: ((x * on).sum(1) / on.sum(1)).mean()),
            "First the mean of each row",
        ),
        (tagging_template(lambda x, on: -(x * on).sum() / on.sum()), "The sign is missing"),
    ],
    "best_epoch": [
        (epoch_template(lambda d, t: top(t), lambda i, d, t: t[i]), "picked on the test set"),
        (epoch_template(lambda d, t: top(d), lambda i, d, t: d[i]), "The development score is"),
        (epoch_template(lambda d, t: len(d) - 1, lambda i, d, t: t[i]), "The last epoch is"),
        (epoch_template(lambda d, t: top(d), lambda i, d, t: max(t)), "comes from another"),
        (from_zero, "Epochs count from 1"),
        (epoch_template(lambda d, t: latest_top(d), lambda i, d, t: t[i]), "the latest is taken"),
        (
            epoch_template(lambda d, t: top([-x for x in d]), lambda i, d, t: t[i]),
            "The worst epoch is chosen",
        ),
    ],
    "trainable_counts": [
        ((1536, POOLED - 2, LAST - 2, ALL - 2), "one for each class"),
        ((769, POOLED - 769, LAST - 769, ALL - 769), "it has two outputs"),
        ((NEW, POOLED - 768, LAST - 768, ALL), "one for each of its outputs"),
        ((NEW, POOLED - NEW, LAST - NEW, ALL), "The pooler by itself"),
        ((NEW, POOLED, LAST - 3072, ALL), "its norms are missing"),
        ((NEW, POOLED, LAST - 590_592, ALL), "one of the four attention projections"),
        ((NEW, POOLED, LAST - 6912, ALL), "The last block: it has no biases"),
        ((NEW, POOLED, LAST, ALL - NEW), "is not among the 109,482,240"),
    ],
    "mixture_rates": [
        (lambda sizes, limit: [n / sum(sizes) for n in sizes], "The limit is not used"),
        (lambda sizes, limit: [1 / len(sizes) for _ in sizes], "All tasks have the same rate"),
        (lambda sizes, limit: [n if n < limit else limit for n in sizes], "These are counts"),
        (
            lambda sizes, limit: [min(n, limit) / sum(sizes) for n in sizes],
            "the rates do not sum to 1",
        ),
        (
            lambda sizes, limit: rates_by_tensor([max(n, limit) for n in sizes], 10**9),
            "The larger of size and limit",
        ),
    ],
    "adam_move": [
        (lambda x, g, rate: -rate * torch.outer(g, x) @ x, "That is gradient descent"),
        (lambda x, g, rate: rate * torch.outer(g, x).sign() @ x, "It goes uphill"),
        (lambda x, g, rate: -rate * x.sum() * g.sign(), "so they cancel"),
        (lambda x, g, rate: -rate * (x @ x).sqrt() * g.sign(), "The Euclidean length"),
        (lambda x, g, rate: -rate * g.sign() * x.abs().mean(), "The mean over the inputs"),
        (lambda x, g, rate: -rate * g.sign() * len(x), "the input that it meets again"),
    ],
    "num_labels_after": [
        ("a", "No layer is made by writing"),
        ("b", "its weights stay as they are"),
        ("d", "It runs as before"),
        ("e", "Nothing watches the configuration"),
    ],
    "fix_tune_step": [
        (step_template(padding=True), "as if they were the first class"),
        (step_template(total=True), "so the step grows with the batch"),
        (step_template(melted=True), "although it is frozen"),
        (step_template(swapped=True), "The head got the body's smaller rate"),
        (
            step_template(total=True, melted=True),
            "grows with the batch. The body moves although",
        ),
        (
            step_template(padding=True, swapped=True),
            "as if they were the first class. The head got",
        ),
    ],
}
