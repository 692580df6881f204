"""Right answers that are built differently, and typical wrong ones, for the chapter on prompts."""

import itertools
import math

import torch
import torch.nn.functional as F

# --- Right answers --------------------------------------------------------------------------------


def prompt_by_filling(prompt, x):
    P, (B, T, D) = len(prompt), x.shape
    out = torch.empty(B, P + T, D)
    out[:, :P], out[:, P:] = prompt, x
    return out


def labels_by_rows(tokens, keep, P):
    rows = [
        [-100] * P + [token if real else -100 for token, real in zip(row, kept, strict=True)]
        for row, kept in zip(tokens.tolist(), keep.tolist(), strict=True)
    ]
    return torch.tensor(rows)


def nearest_by_loops(prompt, table):
    best = []
    for vector in prompt:
        cosines = [torch.dot(vector, row) / vector.norm() / row.norm() for row in table]
        best.append(max(range(len(table)), key=lambda i: cosines[i].item()))
    return torch.tensor(best)


def mask_by_loops(keep, P):
    B, T = keep.shape
    mask = torch.zeros(B, T, P + T, dtype=torch.bool)
    for b, t, s in itertools.product(range(B), range(T), range(P + T)):
        mask[b, t, s] = s < P or (s - P <= t and bool(keep[b, s - P]))
    return mask


def positions_by_rows(keep, P):
    rows = []
    for row in keep.tolist():
        at, places = P, []
        for real in row:
            places.append(at if real else P)
            at += real
        rows.append(places)
    return torch.tensor(rows)


def attention_by_loops(q, k, v, prefix_k, prefix_v):
    out = []
    for t, query in enumerate(q):
        keys = torch.vstack((prefix_k, k[: t + 1]))
        values = torch.vstack((prefix_v, v[: t + 1]))
        weight = (keys @ query / math.sqrt(len(query))).exp()
        out.append((weight[:, None] * values).sum(0) / weight.sum())
    return torch.stack(out)


def share_by_sums(text_scores, prefix_scores):
    own, other = prefix_scores.exp().sum(1), text_scores.exp().sum(1)
    return own / (own + other)


def layers_by_loops(flat, L, H):
    E = flat.shape[1] // (2 * L * H)
    out = torch.empty(L, 2, H, len(flat), E)
    for layer, kind, head in itertools.product(range(L), range(2), range(H)):
        start = ((layer * 2 + kind) * H + head) * E
        out[layer, kind, head] = flat[:, start : start + E]
    return out


def network_by_rows(e, w1, b1, w2, b2):
    return torch.stack([w2 @ torch.tanh(w1 @ row + b1) + b2 for row in e])


def counts_by_layers(P, L, D, M):
    sizes = [(D, M), (M, L * D * 2)]
    network = sum((i + 1) * o for i, o in sizes)
    return P * D, sum(P * D for _ in range(L) for _ in ("key", "value")), P * D + network


def work_by_passes(N, T, P):
    return sum([2 * N * T] * 3), sum([2 * N * (T + P)] * 2)


ALTERNATIVES = {
    "with_prompt": [prompt_by_filling],
    "widened_labels": [labels_by_rows],
    "nearest": [nearest_by_loops],
    "prefix_mask": [mask_by_loops],
    "prefix_positions": [positions_by_rows],
    "prefix_attention": [attention_by_loops],
    "prefix_share": [share_by_sums],
    "by_layer": [layers_by_loops],
    "without_network": [network_by_rows],
    "count_prefix": [counts_by_layers],
    "training_work": [work_by_passes],
}


# --- Wrong answers --------------------------------------------------------------------------------


def softmax_of(q, k, v, mask=None):
    scores = q @ k.mT / math.sqrt(q.shape[1])
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    return torch.softmax(scores, 1) @ v


def lower(T, S, shift):
    return torch.arange(S) <= torch.arange(T)[:, None] + shift


def head_with(mask_shift):
    def answer(q, k, v, pk, pv):
        mask = None if mask_shift is None else lower(len(q), len(q) + len(pk), mask_shift(len(pk)))
        return softmax_of(q, torch.vstack((pk, k)), torch.vstack((pv, v)), mask)

    return answer


def two_softmaxes(q, k, v, pk, pv):
    return softmax_of(q, k, v, lower(len(q), len(q), 0)) + softmax_of(q, pk, pv)


def masked(rows=lambda P, T: T, shift=lambda P: P, before=True, padding=True, prefix=True):
    def answer(keep, P):
        (B, T), n = keep.shape, P
        mask = lower(rows(n, T), n + T, shift(n))[None].repeat(B, 1, 1)
        if padding:
            mask = mask & torch.hstack((torch.ones(B, n, dtype=torch.bool), keep))[:, None, :]
        if not prefix:
            mask[:, :, :n] = False
        return mask if before else mask.roll(-n, dims=2)

    return answer


def counted(values=2, biases=1, vectors=1, layers=True, beside=False, everywhere=False):
    def answer(P, L, D, M):
        slot = values * D * (L if layers else 1)
        network = D * M + biases * M + M * slot + biases * slot
        prompt = P * D * (L if everywhere else 1)
        return prompt, P * slot, vectors * P * D + network + beside * P * slot

    return answer


WRONG = {
    "with_prompt": [
        (lambda p, x: torch.stack([torch.vstack((row, p)) for row in x]), "stands after the text"),
        (
            lambda p, x: torch.stack([torch.vstack((p, row[len(p) :])) for row in x]),
            "in the place of the first tokens",
        ),
        (lambda p, x: x + p.sum(0) / len(p), "positions of its own"),
        (
            lambda p, x: torch.stack([torch.vstack((p.flipud(), row)) for row in x]),
            "in the opposite order",
        ),
        (
            lambda p, x: torch.stack([torch.vstack((p.mean(0).repeat(len(p), 1), r)) for r in x]),
            "get the same vector",
        ),
    ],
    "widened_labels": [
        (
            lambda t, k, P: torch.hstack(
                (torch.zeros(len(t), P, dtype=torch.long), torch.where(k, t, -100))
            ),
            "labelled 0",
        ),
        (
            lambda t, k, P: torch.hstack((torch.full((len(t), P), -100), t)),
            "labelled with the padding token",
        ),
        (lambda t, k, P: torch.where(k, t, -100), "are not widened"),
        (
            lambda t, k, P: torch.hstack((torch.where(k, t, -100), torch.full((len(t), P), -100))),
            "stand behind the text",
        ),
        (
            lambda t, k, P: torch.hstack(
                (
                    torch.full((len(t), P - 1), -100),
                    torch.where(k, t, -100),
                    torch.full((len(t), 1), -100),
                )
            ),
            "shifts them once more",
        ),
    ],
    "nearest": [
        (lambda p, t: torch.einsum("pd,vd->pv", p, t).max(1).indices, "largest dot product"),
        (lambda p, t: (p[:, None] - t).square().sum(-1).min(1).indices, "smallest distance"),
        (
            lambda p, t: F.cosine_similarity(p[:, None], t[None], dim=2).min(1).indices,
            "points the other way",
        ),
        (
            lambda p, t: F.cosine_similarity(p[:, None], t[None], dim=2).max(0).indices,
            "the other way round",
        ),
        (
            lambda p, t: ((p / p.norm(dim=0)) @ (t / t.norm(dim=0)).T).max(1).indices,
            "normalised over the tokens",
        ),
    ],
    "prefix_mask": [
        (masked(prefix=False), "nothing looks at it"),
        (masked(shift=lambda P: 0), "starts at the first column"),
        (masked(before=False), "stand behind those of the text"),
        (masked(rows=lambda P, T: P + T, shift=lambda P: 0), "never looks"),
        (masked(padding=False), "Padding is visible"),
        (lambda k, P: masked()(k, P) & k.unsqueeze(2), "rows of padding are closed"),
        (masked(shift=lambda P: 99), "tokens look ahead"),
    ],
    "prefix_positions": [
        (lambda k, P: torch.where(k, k.cumsum(1) - 1, 0), "as if there were no prefix"),
        (lambda k, P: torch.where(k, torch.arange(P, P + k.shape[1]), P), "it shifts the text"),
        (lambda k, P: torch.arange(P, P + k.shape[1]).repeat(len(k), 1), "counted through"),
        (lambda k, P: torch.where(k, k.cumsum(1) + P, P), "One too many"),
        (lambda k, P: torch.where(k, k.cumsum(1) + P - 2, P), "One too few"),
        (lambda k, P: torch.where(k, k.cumsum(1) + P - 1, 0), "the padding is not"),
    ],
    "prefix_attention": [
        (two_softmaxes, "each with its own softmax"),
        (lambda q, k, v, pk, pv: softmax_of(q, k, v, lower(len(q), len(q), 0)), "not looked at"),
        (head_with(lambda P: 0), "starts at the first slot"),
        (head_with(None), "looks ahead"),
        (
            lambda q, k, v, pk, pv: head_with(lambda P: P)(math.sqrt(q.shape[1]) * q, k, v, pk, pv),
            "not divided by the root",
        ),
        (
            lambda q, k, v, pk, pv: head_with(lambda P: P)(q, k, v, pv, pk),
            "have changed places",
        ),
    ],
    "prefix_share": [
        (lambda t, p: t.exp().sum(1) / torch.hstack((t, p)).exp().sum(1), "share of the text"),
        (lambda t, p: p.sum(1) / torch.hstack((t, p)).sum(1), "without the exponential"),
        (lambda t, p: p.exp().sum(1) / t.exp().sum(1), "divide by both together"),
        (
            lambda t, p: torch.ones(len(t)) * p.shape[1] / (p.shape[1] + t.shape[1]),
            "all scores are equal",
        ),
        (lambda t, p: p.exp().amax(1) / torch.hstack((t, p)).exp().sum(1), "one slot"),
        (lambda t, p: torch.ones(len(t)), "add up to 1"),
    ],
    "by_layer": [
        (lambda f, L, H: f.flatten().view(L, 2, H, len(f), -1), "at once"),
        (
            lambda f, L, H: torch.stack(
                [half.unflatten(1, (L, H, -1)).permute(1, 2, 0, 3) for half in f.chunk(2, dim=1)],
                dim=1,
            ),
            "all keys first",
        ),
        (lambda f, L, H: layers_by_loops(f, L, H)[:, [1, 0]], "have changed places"),
        (
            lambda f, L, H: f.unflatten(1, (L, 2, -1, H)).permute(1, 2, 4, 0, 3),
            "as the fastest axis",
        ),
        (lambda f, L, H: layers_by_loops(f, L, H).flip(0), "in the opposite order"),
    ],
    "without_network": [
        (lambda e, a, b, c, d: F.linear(F.linear(e, a, b), c, d), "between the layers is missing"),
        (lambda e, a, b, c, d: F.linear(F.relu(F.linear(e, a, b)), c, d), "A ReLU stands"),
        (lambda e, a, b, c, d: network_by_rows(e, a, b, c, d).tanh(), "after the second layer"),
        (lambda e, a, b, c, d: F.linear(F.linear(e, a).tanh(), c, d), "The first bias"),
        (lambda e, a, b, c, d: F.linear(F.linear(e, a, b).tanh(), c), "The last bias"),
        (lambda e, a, b, c, d: e.clone(), "that go into the network"),
    ],
    "count_prefix": [
        (counted(values=1), "Keys and values are two"),
        (counted(biases=0), "The biases of the network"),
        (counted(vectors=0), "starts from train too"),
        (counted(layers=False), "of its own in every layer"),
        (counted(beside=True), "do not train beside it"),
        (counted(everywhere=True), "before the first layer only"),
    ],
    "training_work": [
        (lambda N, T, P: (6 * N * T, 2 * N * T + 2 * N * P), "as much as the forward pass"),
        (lambda N, T, P: (6 * N * T, 4 * N * T), "are positions too"),
        (lambda N, T, P: (6 * N * T, 6 * N * T + 6 * N * P), "the last third falls away"),
        (lambda N, T, P: (4 * N * T, 4 * N * T + 4 * N * P), "has two gradients"),
        (lambda N, T, P: (6 * N * T, 4 * N * P), "the text is read as well"),
    ],
}
