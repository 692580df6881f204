"""Right answers that are built differently, and typical wrong ones, for the comparing chapter."""

import itertools
import math
import statistics

import torch

# --- Right answers -----------------------------------------------------------------------------


def percent_by_tensors(n_layers, d_model, r, n_base):
    shapes = [(r, d_model), (d_model, r)] * 2 * n_layers
    return sum(a * b for a, b in shapes) / n_base * 100


def bytes_by_sums(n_base, n_added, n_trained):
    numbers = (n_base + n_added, n_trained, 2 * n_trained)
    return tuple(torch.tensor([], dtype=torch.float32).element_size() * n for n in numbers)


def fit_by_loops(base, adapter, room):
    models = 0
    while (models + 1) * base <= room:
        models += 1
    tasks, left = 0, room - base
    while left >= adapter:
        tasks, left = tasks + 1, left - adapter
    return models, tasks


def products_by_first(trains, prompt):
    first = -1 if prompt else trains.index(True)
    return len(trains), len(trains) - 1 - first, len([t for t in trains if t])


def cost_by_shapes(d_in, d_out, r, m):
    def cost(*widths):
        return sum(a * b for a, b in itertools.pairwise(widths))

    return cost(d_in, d_out) + cost(d_in, r, d_out), cost(d_in, d_out), cost(d_in, d_out, m, d_out)


def rates_by_sorting(scores, rates):
    best = []
    for rows in scores:
        order = sorted((-round(sum(s.tolist()), 9), r) for s, r in zip(rows, rates, strict=True))
        best.append(order[0][1])
    return best


def paired_by_sums(a, b):
    n = len(a)
    d = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(d) / n
    return mean, math.sqrt(sum((x - mean) ** 2 for x in d) / (n * (n - 1)))


def verdict_by_distance(gap, error, t):
    if abs(gap) <= t * error:
        return "undecided"
    return {1.0: "better", -1.0: "worse"}[math.copysign(1.0, gap)]


ALTERNATIVES = {
    "lora_percent": [percent_by_tensors],
    "training_bytes": [bytes_by_sums],
    "adapters_that_fit": [fit_by_loops],
    "backward_products": [products_by_first],
    "inference_cost": [cost_by_shapes],
    "unfair": ["C", "(c)"],
    "choose_rates": [rates_by_sorting],
    "tuning_runs": [[110, 55, 230]],
    "paired_difference": [paired_by_sums],
    "verdict": [verdict_by_distance],
}

# --- Wrong answers -----------------------------------------------------------------------------


def percent(change):
    return lambda L, D, r, n: change(percent_by_tensors(L, D, r, n), L, D, r, n)


def changed(right, change):
    return lambda *args: change(right(*args), *args)


def spread(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def judge(reach):
    def answer(gap, error, t):
        far = reach(error)
        return "better" if gap > far else "worse" if gap < -far else "undecided"

    return answer


def rates_by(key):
    def answer(scores, rates):
        return [max(zip(map(key, rows), rates, strict=True))[1] for rows in scores]

    return answer


def one_for_all(scores, rates):
    return [rates[scores.mean(dim=2).mean(dim=0).argmax()]] * len(scores)


WRONG = {
    "lora_percent": [
        (percent(lambda p, *_: p / 100), "That is the share, not per cent."),
        (percent(lambda p, *_: p / 2), "One factor of each pair is missing"),
        (percent(lambda p, *_: p * 2), "keys, values and output are counted"),
        (percent(lambda p, L, *_: p / L), "counts a single block"),
        (percent(lambda p, L, D, r, n: p * D / (2 * r)), "what trains are its factors"),
        (percent(lambda p, *_: 100 * p / (100 + p)), "base and LoRA together"),
    ],
    "training_bytes": [
        (lambda b, a, t: (4 * b, 4 * t, 8 * t), "those that were added are not counted"),
        (lambda b, a, t: (4 * (b + t), 4 * t, 8 * t), "all that trains is added to the base"),
        (lambda b, a, t: (4 * t, 4 * t, 8 * t), "The frozen ones are needed to compute."),
        (lambda b, a, t: (b + a, t, 2 * t), "Weights: that is their number"),
        (lambda b, a, t: (4 * (b + a), 4 * (b + a), 8 * t), "a frozen parameter has none."),
        (lambda b, a, t: (4 * (b + a), 4 * a, 8 * t), "only the added parameters are counted."),
        (lambda b, a, t: (4 * (b + a), 4 * t, 4 * t), "there are two for each parameter"),
        (lambda b, a, t: (4 * (b + a), 4 * t, 12 * t), "the gradient is counted again"),
    ],
    "adapters_that_fit": [
        (lambda b, a, r: (r // b, r // a), "without it none of them works"),
        (lambda b, a, r: (r // b, r // (a + b)), "each is stored with a base of its own"),
        (lambda b, a, r: (r / b, (r - b) / a), "Models: that is not a whole number"),
        (lambda b, a, r: ((r - b) // b, (r - b) // a), "the base need not be kept"),
        (lambda b, a, r: (r // b, math.ceil((r - b) / a)), "Adapters: rounded up"),
    ],
    "backward_products": [
        (lambda t, p: (len(t), sum(t), sum(t)), "as many as layers that train"),
        (lambda t, p: (len(t), len(t), sum(t)), "even where nothing below trains"),
        (
            lambda t, p: (len(t), len(t) if p else len(t) - t.index(True), sum(t)),
            "the first layer that trains need not hand",
        ),
        (
            changed(products_by_first, lambda right, t, p: (*right[:2], len(t))),
            "a frozen layer has no gradient of its weights",
        ),
        (
            changed(products_by_first, lambda right, t, p: (*right[:2], right[2] + p)),
            "the prompt is counted, which is no product",
        ),
        (
            lambda t, p: (len(t), products_by_first(t, False)[1] if any(t) else 0, sum(t)),
            "the prompt lies below all layers",
        ),
    ],
    "inference_cost": [
        (
            changed(cost_by_shapes, lambda right, i, o, r, m: (right[0] - i * o, *right[1:])),
            "Beside: the layer itself is left out",
        ),
        (
            changed(cost_by_shapes, lambda right, i, o, r, m: (i * o + 2 * r * i, *right[1:])),
            "one of LoRA's two factors is missing",
        ),
        (
            changed(cost_by_shapes, lambda right, *_: (right[0], right[0], right[2])),
            "the update is in the weight now",
        ),
        (
            changed(cost_by_shapes, lambda right, *_: (right[0], 2 * right[1], right[2])),
            "the two were added before any token came",
        ),
        (
            changed(cost_by_shapes, lambda right, i, o, r, m: (*right[:2], i * o + m * (i + o))),
            "its features are d_out on both ends",
        ),
        (
            changed(cost_by_shapes, lambda right, i, o, r, m: (*right[:2], i * o)),
            "it cannot be merged",
        ),
        (
            changed(cost_by_shapes, lambda right, i, o, r, m: (*right[:2], i * o + m * o)),
            "only one of its two matrices",
        ),
    ],
    "unfair": [
        ("a", "Seeds and errors for both"),
        ("b", "The same grid for both"),
        ("d", "The rates may differ."),
        ("e", "The number of parameters is what is compared"),
    ],
    "choose_rates": [
        (
            lambda s, r: [r[i] for i in s.amax(dim=2).argmax(dim=1).tolist()],
            "The best single seed decides.",
        ),
        (one_for_all, "All methods get the same rate"),
        (rates_by(lambda seeds: seeds.mean().item()), "the larger one, or the first in the list"),
        (rates_by(lambda seeds: -seeds.mean().item()), "the worst rate of each method"),
        (lambda s, r: [max(row.mean(dim=1).tolist()) for row in s], "These are the mean scores"),
        (lambda s, r: s.mean(dim=2).argmax(dim=1).tolist(), "the places of the rates"),
    ],
    "tuning_runs": [
        ((55, 55, 115), "the two seeds of a rate are not counted"),
        ((550, 55, 230), "the five seeds of the report"),
        ((110, 550, 230), "the rates are counted again."),
        ((110, 11, 230), "each method runs with five seeds"),
        ((110, 55, 330), "all eleven are given three sizes"),
        ((110, 55, 180), "the five methods without a size"),
        ((110, 55, 146), "Every rate is tried with every size"),
    ],
    "paired_difference": [
        (
            lambda a, b: (statistics.fmean(spread(b, a)), paired_by_sums(a, b)[1]),
            "its sign is turned round",
        ),
        (lambda a, b: (sum(spread(a, b)), paired_by_sums(a, b)[1]), "the sum over the seeds"),
        (
            lambda a, b: (paired_by_sums(a, b)[0], statistics.stdev(spread(a, b))),
            "the standard deviation of one difference",
        ),
        (
            lambda a, b: (
                paired_by_sums(a, b)[0],
                math.hypot(*(statistics.stdev(x) / math.sqrt(len(x)) for x in (a, b))),
            ),
            "treated as independent",
        ),
        (
            lambda a, b: (paired_by_sums(a, b)[0], statistics.stdev(spread(a, b)) / len(a)),
            "divided by n instead of its root",
        ),
        (
            lambda a, b: (
                paired_by_sums(a, b)[0],
                statistics.pstdev(spread(a, b)) / math.sqrt(len(a)),
            ),
            "in the denominator of the variance",
        ),
    ],
    "verdict": [
        (judge(lambda error: 0.0), "The sign alone decides."),
        (judge(lambda error: error), "one standard error"),
        (judge(lambda error: 1.96 * error), "1.96 is for many seeds"),
        (lambda gap, error, t: verdict_by_distance(-gap, error, t), "have changed places"),
        (
            lambda gap, error, t: (
                "better" if gap >= t * error else "worse" if gap <= -t * error else "undecided"
            ),
            "only touches 0",
        ),
    ],
}
