"""Right answers that are built differently, and typical wrong ones, for smaller models."""

import math

import torch
import torch.nn.functional as F

# --- Right answers -----------------------------------------------------------------------------


def soften_by_powers(logits, temperature):
    p = torch.softmax(logits, 1) ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def soft_loss_by_entropies(student, teacher, temperature, square=2, over=None, hot=(1, 1)):
    p = torch.softmax(teacher / temperature ** hot[1], -1)
    q = torch.softmax(student / temperature ** hot[0], -1)
    cross, entropy = -(p * q.log()).sum(), -(p * p.log()).sum()
    return (cross - entropy) * temperature**square / (over or student.shape[0])


def gradient_by_rows(student, teacher, temperature):
    rows = []
    for z, v in zip(student, teacher, strict=True):
        p, q = (v / temperature).exp(), (z / temperature).exp()
        rows.append(temperature * (q / q.sum() - p / p.sum()) / student.size(0))
    return torch.stack(rows)


def limit_by_variance(student, teacher):
    d = student - teacher
    return (d.var(dim=1, unbiased=False) / 2).mean()


def mixture_template(square=2, hard_power=0, hard_square=0, everywhere=False, shares=None):
    def mixed_loss(student, teacher, targets, temperature, soft):
        counts = torch.full(targets.shape, everywhere) | (targets >= 0)
        p = (teacher / temperature).softmax(-1)
        divergence = (p * (p.log() - (student / temperature).log_softmax(-1))).sum(-1)
        first = temperature**square * (divergence * counts).sum() / counts.sum()
        second = F.cross_entropy(student / temperature**hard_power, targets, ignore_index=-100)
        one, two = (soft, 1 - soft) if shares is None else shares(soft)
        return one * first + two * second * temperature**hard_square

    return mixed_loss


def step_template(gradient=False, side=False, direction=False, square=False):
    """By hand, without autograd, with any of the mistakes left in where that is possible."""

    def fix_step(x, student, teacher, temperature):
        W, U = student.clone().requires_grad_(True), teacher.clone().requires_grad_(True)
        v = torch.einsum("nd,vd->nv", x, U if gradient else teacher)
        z = torch.einsum("nd,vd->nv", x, W)
        p = torch.softmax(v / temperature, -1)
        q = torch.softmax(z if side else z / temperature, -1)
        if direction:
            p, q = q, p
        loss = (p * (p / q).log()).sum() / x.shape[0] * (1 if square else temperature**2)
        loss.backward()
        mine = torch.zeros_like(teacher) if U.grad is None else U.grad
        return loss.detach(), W.grad, mine

    return fix_step


def layers_by_linspace(N, K):
    return [int(n) for n in torch.floor(torch.linspace(0, N - 1, K).double() + 0.5 + 1e-6)]


def directions_by_unit_vectors(student, teacher, keep):
    a, b = (F.normalize(h, dim=2) for h in (student, teacher))
    return ((a - b).square().sum(2) / 2 * keep).sum() / keep.sum()


def units_by_topk(up, bias, down, n):
    _, best = torch.topk(down.abs().sum(0), n)
    return (
        up.index_select(0, best),
        bias.index_select(0, best),
        down.index_select(1, best),
    )


def heads_by_blocks(q, k, v, o, order):
    E = q.shape[0] // order.shape[0]
    q, k, v = (torch.cat([w.split(E)[h] for h in order.tolist()]) for w in (q, k, v))
    return q, k, v, torch.cat([o.split(E, dim=1)[h] for h in order.tolist()], dim=1)


ALTERNATIVES = {
    "soften": [soften_by_powers],
    "soft_loss": [soft_loss_by_entropies],
    "soft_gradient": [gradient_by_rows],
    "hot_limit": [limit_by_variance],
    "mixed_loss": [mixture_template()],
    "fix_step": [step_template()],
    "student_layers": [layers_by_linspace],
    "direction_loss": [directions_by_unit_vectors],
    "keep_units": [units_by_topk],
    "order_heads": [heads_by_blocks],
}

# --- Wrong answers -----------------------------------------------------------------------------


def units_template(score=lambda u, d: d.abs().sum(0), up=True, bias=True, down=True):
    def keep_units(u, b, d, n):
        best = torch.sort(score(u, d), descending=True).indices[:n]
        plain = torch.arange(n)
        return u[best if up else plain], b[best if bias else plain], d[:, best if down else plain]

    return keep_units


def units_ascending(u, b, d, n):
    best = d.abs().sum(0).argsort()[len(b) - n :]
    return u[best], b[best], d[:, best]


def heads_template(index, keys=True, values=True, out="columns"):
    def order_heads(q, k, v, o, order):
        H = len(order)
        rows = index(order, H, q.shape[0] // H)
        last = {"columns": o[:, rows], "rows": o[rows], "none": o.clone()}[out]
        return q[rows], k[rows] if keys else k.clone(), v[rows] if values else v.clone(), last

    return order_heads


def blocks(order, H, E):
    return (order[:, None] * E + torch.arange(E)).reshape(-1)


WRONG = {
    "soften": [
        (lambda z, T: torch.softmax(z * T, 1), "sharpens where it should soften"),
        (lambda z, T: torch.softmax(z, 1) / T, "a row no longer sums to 1"),
        (lambda z, T: torch.softmax(z / T, 0), "runs down the rows"),
        (lambda z, T: torch.softmax(z, 1), "the distribution at T = 1"),
        (lambda z, T: torch.log_softmax(z / T, 1), "logarithms of the probabilities"),
    ],
    "soft_loss": [
        (lambda z, v, T: soft_loss_by_entropies(z, v, T, square=0), "T² is forgotten"),
        (lambda z, v, T: soft_loss_by_entropies(z, v, T, square=1), "The factor is T."),
        (lambda z, v, T: soft_loss_by_entropies(v, z, T), "The direction is swapped"),
        (lambda z, v, T: soft_loss_by_entropies(z, v, T, hot=(0, 1)), "Only the teacher is"),
        (lambda z, v, T: soft_loss_by_entropies(z, v, T, hot=(1, 0)), "Only the student is"),
        (
            lambda z, v, T: soft_loss_by_entropies(z, v, T, over=z.numel()),
            "over the vocabulary too",
        ),
        (lambda z, v, T: soft_loss_by_entropies(z, v, T, over=1), "summed and not averaged"),
        (
            lambda z, v, T: T * T * F.cross_entropy(z / T, torch.softmax(v / T, 1)),
            "the teacher's own entropy",
        ),
    ],
    "soft_gradient": [
        (lambda z, v, T: -gradient_by_rows(z, v, T), "that of the step"),
        (lambda z, v, T: gradient_by_rows(z, v, T) / T, "A factor T is missing"),
        (lambda z, v, T: gradient_by_rows(z, v, T) * T, "A factor T too many"),
        (lambda z, v, T: gradient_by_rows(z, v, T) / T / T, "without its T²"),
        (lambda z, v, T: gradient_by_rows(z, v, T) * z.size(0), "a factor 1/N"),
        (lambda z, v, T: gradient_by_rows(z, v, 1) * T, "are not softened"),
    ],
    "hot_limit": [
        (lambda z, v: F.mse_loss(z, v) / 2, "The logits are not centred"),
        (lambda z, v: limit_by_variance(z, v) * 2, "The factor 1/2 is missing"),
        (lambda z, v: limit_by_variance(z, v) * z.size(1), "1/V of them stays"),
        (lambda z, v: limit_by_variance(z, v) / z.size(1), "one V too many"),
        (lambda z, v: limit_by_variance(z, v) * z.size(0), "summed over the rows"),
    ],
    "mixed_loss": [
        (mixture_template(shares=lambda s: (1 - s, s)), "The shares are swapped"),
        (mixture_template(hard_power=1), "is softened too"),
        (mixture_template(hard_square=2), "multiplies the loss on labels"),
        (mixture_template(everywhere=True), "where there is no label"),
        (mixture_template(square=0), "is missing in the loss on soft targets"),
        (mixture_template(shares=lambda s: (1, 1)), "are added in full"),
        (
            lambda z, v, y, T, s: (
                mixture_template()(z, v, y, T, 1) * s
                + (1 - s) * F.cross_entropy(z, y, reduction="none").mean()
            ),
            "divided by all positions",
        ),
    ],
    "fix_step": [
        (step_template(gradient=True), "One mistake is left: the teacher receives a gradient"),
        (step_template(side=True), "One mistake is left: the student is not softened"),
        (step_template(direction=True), "One mistake is left: the divergence runs"),
        (step_template(square=True), "One mistake is left: the factor T²"),
        (
            step_template(gradient=True, square=True),
            "to imitate; the factor T² is missing",
        ),
        (
            step_template(side=True, direction=True, square=True),
            "Three mistakes are left",
        ),
    ],
    "student_layers": [
        (lambda N, K: [*range(N)][:K], "taken from the front"),
        (lambda N, K: [*range(N)][N - K :], "taken from the back"),
        (lambda N, K: [i * N // K for i in range(K)], "The step is N/K"),
        (lambda N, K: [i * (N - 1) // (K - 1) for i in range(K)], "cut off and not rounded"),
        (lambda N, K: [math.ceil(i * (N - 1) / (K - 1)) for i in range(K)], "always rounded up"),
        (lambda N, K: [n + 1 for n in layers_by_linspace(N, K)], "start at 1"),
        (lambda N, K: [round(i * (N - 1) / (K - 1)) for i in range(K)], "the even neighbour"),
    ],
    "direction_loss": [
        (
            lambda h, g, k: 1 - F.cosine_similarity(h, g, dim=-1).mean(),
            "The padding counts too",
        ),
        (
            lambda h, g, k: ((1 - F.cosine_similarity(h, g, dim=-1)) * k).mean(),
            "still divides by all positions",
        ),
        (
            lambda h, g, k: (
                ((1 - F.cosine_similarity(h, g, dim=-1)) * k).sum(1) / k.sum(1)
            ).mean(),
            "a mean of its own",
        ),
        (lambda h, g, k: F.cosine_similarity(h[k], g[k]).mean(), "This is the cosine itself"),
        (lambda h, g, k: -F.cosine_similarity(h[k], g[k]).mean(), "This is minus the cosine"),
        (lambda h, g, k: 1 - (h[k] * g[k]).sum(1).mean(), "a dot product is no cosine"),
        (
            lambda h, g, k: 1 - F.cosine_similarity(h[k].view(1, -1), g[k].view(1, -1)).mean(),
            "joined into one long vector",
        ),
        (lambda h, g, k: 1 - F.cosine_similarity(h[k].T, g[k].T).mean(), "along the positions"),
    ],
    "keep_units": [
        (units_template(lambda u, d: -d.abs().sum(0)), "The least important units"),
        (units_ascending, "the most important comes last"),
        (units_template(lambda u, d: d.norm(dim=0)), "a sum of squares"),
        (units_template(lambda u, d: u.abs().sum(1)), "by which a unit listens"),
        (units_template(lambda u, d: d.sum(0)), "summed with their signs"),
        (units_template(bias=False), "The bias keeps its old order"),
        (units_template(down=False), "speak with others' voices"),
        (units_template(up=False, bias=False, down=False), "without any sorting"),
    ],
    "order_heads": [
        (heads_template(lambda o, H, E: blocks(o.argsort(), H, E)), "The permutation is inverted"),
        (
            heads_template(lambda o, H, E: torch.arange(H * E).view(E, H)[:, o].reshape(-1)),
            "every H-th row",
        ),
        (
            heads_template(lambda o, H, E: torch.cat((o, torch.arange(H, H * E)))),
            "as if each head had one row",
        ),
        (lambda q, k, v, o, order: (q, k, v, o), "stand where they stood"),
        (heads_template(blocks, out="rows"), "features of the output"),
        (heads_template(blocks, out="none"), "takes each head for another one"),
        (heads_template(blocks, keys=False), "meet the keys of another head"),
        (heads_template(blocks, values=False), "averages another head's values"),
    ],
}
