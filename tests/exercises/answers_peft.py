"""Right answers that are built differently, and typical wrong ones, for the chapter on PEFT."""

import math

import torch
import torch.nn.functional as F

# --- Right answers -----------------------------------------------------------------------------


def lora_by_merging(x, weight, bias, A, B, alpha):
    whole = weight + torch.einsum("or,ri->oi", B, A) * (alpha / A.shape[0])
    return F.linear(x, whole, bias)


def gradients_by_loops(x, A, B, alpha, g):
    grad_A, grad_B = torch.zeros_like(A), torch.zeros_like(B)
    for n in range(len(x)):
        grad_A += torch.outer(B.T @ g[n], x[n])
        grad_B += torch.outer(g[n], A @ x[n])
    return grad_A * alpha / len(A), grad_B * alpha / len(A)


def merge_by_outer_products(weight, A, B, alpha, in_out):
    update = sum(torch.outer(B[:, j], A[j]) for j in range(len(A))) * alpha / len(A)
    return weight + (update.mT if in_out else update)


def layer_by_branches(x, weight, A, B, alpha, p, training, merged):
    y = torch.einsum("nti,oi->nto", x, weight)
    if not merged:
        seen = F.dropout(x, p) if training else x
        y = y + torch.einsum("nti,ri,or->nto", seen, A, B) * alpha / len(A)
    return y


def trains_by_words(names, head):
    chosen = []
    for name in names:
        first, *_, last = name.split(".")
        if last in ("lora_A", "lora_B") or first == head:
            chosen.append(name)
    return chosen


def rank_by_approximating(delta, tolerance):
    U, s, V = torch.linalg.svd(delta, full_matrices=False)
    r = 0
    while torch.dist(delta, U[:, :r] * s[:r] @ V[:r]) > tolerance * delta.norm():
        r += 1
    return r


def switch_by_one_product(merged, old, new):
    A = torch.cat((old[0], new[0]))
    scales = [-old[2] / len(old[0])] * len(old[0]) + [new[2] / len(new[0])] * len(new[0])
    return merged + torch.cat((old[1], new[1]), dim=1) * torch.tensor(scales) @ A


def adapter_by_modules(h, down, b_down, up, b_up):
    return torch.stack([row + F.linear(F.gelu(F.linear(row, down, b_down)), up, b_up) for row in h])


def ia3_by_diagonals(weight, bias, gain, of_input):
    gains = torch.diag(gain)
    return (weight @ gains, bias) if of_input else (gains @ weight, gains @ bias)


ALTERNATIVES = {
    "lora_forward": [lora_by_merging],
    "lora_gradients": [gradients_by_loops],
    "merge_lora": [merge_by_outer_products],
    "fix_lora": [layer_by_branches],
    "what_trains": [trains_by_words],
    "rank_needed": [rank_by_approximating],
    "switch_task": [switch_by_one_product],
    "adapter_forward": [adapter_by_modules],
    "merge_ia3": [ia3_by_diagonals],
    "count_parameters": [(294_912, 2_379_264, 55_296, 9_216)],
    "qlora_bytes": [(4.5, 4.127, 3.611)],
}

# --- Wrong answers -----------------------------------------------------------------------------


def lora_template(scale=lambda alpha, r: alpha / r, layer=F.linear):
    return lambda x, W, b, A, B, alpha: layer(x, W, b) + scale(alpha, len(A)) * x @ A.T @ B.T


def gradients_template(a=lambda g, n, s: s * g, b=lambda g, n, s: s * g):
    def gradients(x, A, B, alpha, g):
        s = alpha / len(A)
        return a((g @ B).T @ x, len(x), s), b(g.T @ (x @ A.T), len(x), s)

    return gradients


def merge_template(scale=lambda alpha, r: alpha / r, add=lambda W, U: W + U, square=False):
    def merge(weight, A, B, alpha, in_out):
        update = scale(alpha, len(A)) * B @ A
        turn = update.shape != weight.shape if square else in_out
        return add(weight, update.T if turn else update)

    return merge


def layer_template(scale=False, always=False, base=False, twice=False):
    def layer(x, weight, A, B, alpha, p, training, merged):
        dropped = F.dropout(x, p, True if always else training)
        y = (dropped if base else x) @ weight.T
        if merged and not twice:
            return y
        return y + (len(A) / alpha if scale else alpha / len(A)) * dropped @ A.T @ B.T

    return layer


def update(A, B, alpha):
    return alpha / len(A) * B @ A


def energies(delta, power):
    s = torch.linalg.svdvals(delta) ** power
    return torch.tensor([s[r:].sum() / s.sum() for r in range(len(s) + 1)])


WRONG = {
    "lora_forward": [
        (lora_template(lambda alpha, r: 1.0), "alpha has no effect"),
        (lora_template(lambda alpha, r: r / alpha), "upside down"),
        (lora_template(lambda alpha, r: alpha), "scaled by alpha alone"),
        (lora_template(lambda alpha, r: alpha / math.sqrt(r)), "That is rsLoRA"),
        (lora_template(layer=lambda x, W, b: 0), "this is the update alone"),
        (lora_template(layer=lambda x, W, b: x @ W.T), "The bias is missing"),
        (
            lambda x, W, b, A, B, alpha: alpha / len(A) * (F.linear(x, W, b) + x @ A.T @ B.T),
            "The layer is scaled as well",
        ),
    ],
    "lora_gradients": [
        (gradients_template(a=lambda g, n, s: g), "A: the scale is missing"),
        (gradients_template(b=lambda g, n, s: g), "B: the scale is missing"),
        (gradients_template(a=lambda g, n, s: s * g / n), "A: averaged over the inputs"),
        (gradients_template(b=lambda g, n, s: -s * g), "B: it has lost a sign"),
        (
            gradients_template(lambda g, n, s: -s * g, lambda g, n, s: s * g / n),
            "A: its sign is turned; that is a step, not a gradient. B: averaged over",
        ),
    ],
    "merge_lora": [
        (merge_template(lambda alpha, r: 1.0), "Alpha is forgotten"),
        (merge_template(lambda alpha, r: r / alpha), "r / alpha, upside down"),
        (merge_template(square=True), "a square weight gets it untransposed"),
        (merge_template(add=lambda W, U: W - U), "taken away from the weight"),
        (merge_template(add=lambda W, U: U), "This is the update alone"),
        (merge_template(add=lambda W, U: W + U + U), "The update is added twice"),
    ],
    "fix_lora": [
        (layer_template(scale=True), "One mistake is left: the scale is r / alpha"),
        (layer_template(always=True), "One mistake is left: features are dropped in evaluation"),
        (layer_template(base=True), "One mistake is left: what the frozen layer reads"),
        (layer_template(twice=True), "One mistake is left: a merged layer adds"),
        (
            layer_template(scale=True, twice=True),
            "r / alpha; a merged layer adds",
        ),
    ],
    "what_trains": [
        (
            lambda names, head: [
                n for n in names if "lora" in n or ".base." in n or n.startswith(head + ".")
            ],
            "The frozen weights inside",
        ),
        (lambda names, head: [n for n in names if "lora_" in n], "The head is missing"),
        (
            lambda names, head: [n for n in names if "lora_B" in n or n.split(".")[0] == head],
            "Only one of the two factors",
        ),
        (
            lambda names, head: [n for n in names if "lora_" in n or head in n],
            "anywhere in the name",
        ),
        (
            lambda names, head: [n for n in names if "lora_" in n or n.startswith(head)],
            "only begins as the head's does",
        ),
        (
            lambda names, head: [
                n
                for n in names
                if "lora_" in n or n.split(".")[0] == head or n.split(".")[-1] == "bias"
            ],
            "what BitFit does",
        ),
        (
            lambda names, head: [n for n in names if n not in trains_by_words(names, head)],
            "This is what is frozen",
        ),
    ],
    "rank_needed": [
        (lambda d, t: int((energies(d, 2) > t).sum()), "without its root"),
        (lambda d, t: int((energies(d, 1) > t).sum()), "summed as they are"),
        (lambda d, t: int((energies(d, 2).sqrt() > t).sum()) + 1, "one rank too many"),
        (lambda d, t: int((energies(d, 2).sqrt() > t).sum()) - 1, "one rank too few"),
        (
            lambda d, t: sum(
                s > t * torch.linalg.norm(d, 2) for s in torch.linalg.svdvals(d)
            ).item(),
            "a share of the largest one",
        ),
        (lambda d, t: int(torch.linalg.matrix_rank(d)), "the rank of the matrix, whatever"),
    ],
    "switch_task": [
        (lambda W, old, new: W + update(*new), "The old task is still in the weight"),
        (lambda W, old, new: W - update(*old), "The new task is missing"),
        (lambda W, old, new: W + update(*old) - update(*new), "is added again"),
        (lambda W, old, new: W - old[1] @ old[0] + new[1] @ new[0], "not scaled by alpha / r"),
        (
            lambda W, old, new: W - update(*old) + old[2] / len(old[0]) * new[1] @ new[0],
            "with the alpha and the rank of the old one",
        ),
    ],
    "adapter_forward": [
        (lambda h, d, c, u, b: F.gelu(h @ d.T + c) @ u.T + b, "The residual is forgotten"),
        (lambda h, d, c, u, b: h + (h @ d.T + c) @ u.T + b, "There is no nonlinearity"),
        (lambda h, d, c, u, b: h + F.relu(h @ d.T + c) @ u.T + b, "This is ReLU"),
        (lambda h, d, c, u, b: h + F.gelu(h @ d.T) @ u.T, "The biases are missing"),
        (
            lambda h, d, c, u, b: h + F.gelu((h @ d.T + c) @ u.T + b),
            "stands after the second matrix",
        ),
        (
            lambda h, d, c, u, b: h + F.gelu(h @ d.T + c, approximate="tanh") @ u.T + b,
            "by its tanh formula",
        ),
    ],
    "merge_ia3": [
        (
            lambda W, b, gain, n: (W * gain if n else W * gain[:, None], b),
            "Bias: it stays where the output is rescaled",
        ),
        (
            lambda W, b, gain, n: (
                W * gain if W.shape[1] == len(gain) else W * gain[:, None],
                b if n else b * gain,
            ),
            "Weight: rows or columns are chosen by the shape",
        ),
        (lambda W, b, gain, n: (W, b if n else b * gain), "Weight: it is not changed"),
        (
            lambda W, b, gain, n: (
                W / gain if n else W / gain[:, None],
                b if n else b * gain,
            ),
            "Weight: the gains divide",
        ),
        (
            lambda W, b, gain, n: (
                W * gain if n else W * gain[:, None],
                b * gain if len(gain) == len(b) else b,
            ),
            "Bias: it is multiplied though only the input",
        ),
    ],
    "count_parameters": [
        ((147_456, 2_379_264, 55_296, 9_216), "LoRA: this is half"),
        ((24_576, 2_379_264, 55_296, 9_216), "LoRA: this is one block"),
        ((14_155_776, 2_379_264, 55_296, 9_216), "LoRA: these are the whole matrices"),
        ((294_912, 2_359_296, 55_296, 9_216), "Adapters: their biases are missing"),
        ((294_912, 1_189_632, 55_296, 9_216), "Adapters: that is one a block"),
        ((294_912, 2_379_264, 27_648, 9_216), "(IA)³: the inner features are F"),
        ((294_912, 2_379_264, 18_432, 9_216), "(IA)³: only keys and values"),
        ((294_912, 2_379_264, 46_080, 9_216), "(IA)³: one of the three places"),
        ((294_912, 2_379_264, 55_296, 102_912), "BitFit: these are all biases"),
        ((294_912, 2_379_264, 55_296, 7_077_888), "BitFit: the weights of the queries"),
    ],
    "qlora_bytes": [
        ((4, 4.127, 3.611), "The first: the scale of each block is missing"),
        ((36, 4.127, 3.611), "each weight pays a whole scale"),
        ((4.5, 4.125, 3.611), "The second: the scales of the scales are missing"),
        ((4.5, 4.25, 3.72), "shared by 256 weights"),
        ((4.5, 4.127, 3.9375), "The third is without double quantisation"),
        ((4.5, 4.127, 28.89), "in gigabits"),
        ((4.5, 4.127, 3.611e9), "The third is in bytes"),
    ],
}
