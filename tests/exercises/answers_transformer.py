"""Recorded answers to the exercises of `transformer`: right ones written otherwise, and wrong ones.

Wrong answers are what people write; each stands with words of the message that must name it.
"""

import math

import torch
import torch.nn.functional as F

# --- Right answers, written differently --------------------------------------------------------


def layer_norm_by_loops(x, gain, bias, eps):
    out = torch.zeros_like(x)
    B, T, D = x.shape
    for b in range(B):
        for t in range(T):
            mean = sum(x[b, t]) / D
            variance = sum((value - mean) ** 2 for value in x[b, t]) / D
            out[b, t] = (x[b, t] - mean) / (variance + eps) ** 0.5
    return out * gain + bias


def layer_norm_by_moments(x, gain, bias, eps):
    x = x.double()
    mean = torch.einsum("btd->bt", x)[..., None] / x.shape[-1]
    variance = (x * x).mean(-1, keepdim=True) - mean**2
    return torch.addcmul(bias.double(), gain.double(), (x - mean) * (variance + eps).rsqrt())


def feed_forward_by_features(x, w_1, b_1, w_2, b_2):
    out = b_2.expand_as(x)
    for f in range(w_1.shape[1]):
        feature = (x * w_1[:, f]).sum(-1, keepdim=True) + b_1[f]
        out = out + torch.where(feature > 0, feature, 0.0) * w_2[f]
    return out


def residual_as_list(x, sublayer, norm):
    branch = sublayer(norm(x))
    return [norm(sublayer(x) + x), branch.add(x)]


def forced_in_place(target, start_id, pad_id):
    inputs = torch.empty_like(target)
    inputs[:, 0] = start_id
    inputs[:, 1:] = target[:, :-1]
    labels = target.clone()
    labels[labels == pad_id] = -100
    return inputs, labels


def forced_by_padding(target, start_id, pad_id):
    labels = torch.where(target != pad_id, target, -100)
    return F.pad(target, (1, -1), value=start_id), labels


def masks_by_index(source_keep, target_keep):
    S, T = source_keep.shape[-1], target_keep.shape[-1]
    t = torch.arange(T)
    past = t[:, None] >= t[None, :]
    return (
        source_keep.unsqueeze(1).repeat(1, S, 1),
        torch.where(past, target_keep[:, None], False),
        torch.stack([source_keep] * T, dim=1),
    )


def tied_by_one_hot(tokens, hidden, table):
    V, D = table.shape
    picked = F.one_hot(tokens, V).to(table.dtype) @ (table * D**0.5)
    return picked, F.linear(hidden, table)


def smoothed_by_distribution(logits, labels, smoothing):
    V = logits.shape[-1]
    total, count = 0.0, 0
    for z, y in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if y == -100:
            continue
        target = torch.full((V,), smoothing / V)
        target[y] += 1 - smoothing
        total = total - (target * (z - z.logsumexp(0))).sum()
        count += 1
    return total / count


def schedule_by_branches(step, d_model, warmup):
    if step < warmup:
        return step / (warmup * math.sqrt(warmup * d_model))
    return 1 / math.sqrt(d_model * step)


def greedy_by_lists(encode, decode, source, start_id, eos_id, pad_id, n_max):
    memory = encode(source)
    said = [[start_id] for _ in source]
    alive = set(range(len(said)))
    while alive and len(said[0]) <= n_max:
        choice = decode(torch.tensor(said), memory).argmax(-1)[:, -1].tolist()
        for row, token in enumerate(choice):
            said[row].append(token if row in alive else pad_id)
        alive = {row for row in alive if said[row][-1] != eos_id}
    return torch.tensor([row[1:] for row in said])


def decoder_step_by_step(x, memory, memory_keep, attend, cross, ffn, norm_1, norm_2, norm_3):
    """Each position by itself: it sees no later one, so no causal mask is needed."""
    T, S = x.shape[1], memory.shape[1]
    everything = torch.ones(1, 1, 1, dtype=torch.bool)
    rows = [attend(x[:, [t]], x[:, : t + 1], everything) for t in range(T)]
    y = norm_1(torch.cat(rows, 1) + x)
    y = norm_2(cross(y, memory, memory_keep[:, None].expand(-1, T, S)) + y)
    return norm_3(ffn(y) + y)


ALTERNATIVES = {
    "layer_norm": [layer_norm_by_loops, layer_norm_by_moments],
    "feed_forward": [feed_forward_by_features],
    "residual_blocks": [residual_as_list],
    "teacher_forcing": [forced_in_place, forced_by_padding],
    "three_masks": [masks_by_index],
    "tied_embedding": [tied_by_one_hot],
    "base_parameters": [
        [3_152_384, 4_204_032, 18_944_000, 63_082_496],
        (torch.tensor(3152384), 4204032.0, torch.tensor(18944000), 63082496),
    ],
    "smoothed_loss": [smoothed_by_distribution],
    "paper_schedule": [schedule_by_branches],
    "greedy_decode": [greedy_by_lists],
    "fix_decoder_layer": [decoder_step_by_step],
}


# --- Wrong answers -----------------------------------------------------------------------------


def norm_template(dim=-1, correction=0, outside=0.0, gained=True, shifted=True):
    def layer_norm(x, gain, bias, eps):
        mean, var = x.mean(dim, keepdim=True), x.var(dim, keepdim=True, correction=correction)
        y = (x - mean) / (var.sqrt() + eps if outside else torch.sqrt(var + eps))
        y = y * gain if gained else y
        return y + bias if shifted else y

    return layer_norm


def norm_by_sum(x, gain, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return gain * centred / ((centred**2).sum(-1, keepdim=True) + eps) ** 0.5 + bias


def forcing_template(inputs, labels=None):
    def teacher_forcing(target, start_id, pad_id):
        start = target.new_full((len(target), 1), start_id)
        right = torch.where(target == pad_id, -100, target)
        first = inputs(target, start, pad_id)
        return first, right if labels is None else labels(target, first, right)

    return teacher_forcing


def late(target, start, pad_id):
    return torch.hstack((start, target[:, :-1]))


def masks_template(encoder=None, decoder=None, cross=None):
    def three_masks(s, t):
        S, T = s.shape[1], t.shape[1]
        right = masks_by_index(s, t)
        wrong = (encoder, decoder, cross)
        return tuple(r if w is None else w(s, t, S, T) for r, w in zip(right, wrong, strict=True))

    return three_masks


def loss_template(weigh, average, dim=-1):
    def smoothed_loss(logits, labels, smoothing):
        p = torch.log_softmax(logits, dim)
        V = logits.shape[-1]
        hot = F.one_hot(labels.clamp(min=0), V)
        loss = -(p * weigh(hot, smoothing, V)).sum(-1)
        return average(loss, labels != -100)

    return smoothed_loss


def right_weights(hot, eps, V):
    return (1 - eps) * hot + eps / V


def token_mean(loss, real):
    return loss[real].mean()


def greedy_template(
    stop="all", carry="pad", read=-1, cut=1, extra=0, inside=False, by_row=False, newest=False
):
    def greedy_decode(encode, decode, source, start_id, eos_id, pad_id, n_max):
        memory = encode(source)
        if by_row:
            memory = torch.cat([encode(row[None]) for row in source])
        said = source.new_full((source.shape[0], 1), start_id)
        ended = said[:, 0] != start_id
        for _ in range(n_max + extra):
            if inside:
                memory = encode(source)
            logits = decode(said[:, -1:] if newest else said, memory)
            token = logits[:, read].argmax(-1)
            if carry != "words":
                token[ended] = pad_id if carry == "pad" else eos_id
            said = torch.hstack((said, token[:, None]))
            ended = ended | (token == eos_id)
            if (stop == "all" and ended.all()) or (stop == "any" and ended.any()):
                break
            if stop == "same step" and (token == eos_id).all():
                break
        return said[:, cut:]

    return greedy_decode


def wiring_template(causal=True, memory_side=True, skip=True, own_norm=True, hidden=True):
    def layer(x, memory, memory_keep, attend, cross, ffn, norm_1, norm_2, norm_3):
        T = x.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool)
        seen = torch.tril(seen) if causal else seen
        x = norm_1(attend(x, x, seen) + x)
        may_look = memory_keep[:, None] if hidden else torch.tensor(True).expand(1, T, 1)
        y = cross(x, memory, may_look) if memory_side else cross(x, x, seen)
        x = norm_2(x + y) if skip else norm_2(y)
        return norm_3(x + ffn(x)) if own_norm else norm_2(x + ffn(x))

    return layer


E, Dd, W, M = 3_152_384, 4_204_032, 18_944_000, 63_082_496


WRONG = {
    "layer_norm": [
        (norm_template(correction=1), "divided by D - 1, which is torch's default"),
        (norm_template(outside=1), "eps is added after the root"),
        (norm_template(correction=1, outside=1), "Two things differ"),
        (norm_template(dim=0), "as in batch norm"),
        (norm_template(dim=1), "taken over the positions"),
        (norm_template(dim=(0, 1, 2)), "those of the whole tensor"),
        (norm_template(dim=(1, 2)), "those of the whole sequence"),
        (norm_template(gained=False), "The gain is missing"),
        (norm_template(shifted=False), "The bias is missing"),
        (norm_template(gained=False, shifted=False), "Gain and bias are missing"),
        (
            lambda x, g, b, eps: g * (x / (x.pow(2).mean(-1, keepdim=True) + eps) ** 0.5) + b,
            "that is RMS norm",
        ),
        (
            lambda x, g, b, eps: g * (F.layer_norm(x, x.shape[-1:], eps=eps) + b),
            "so it is scaled as well",
        ),
        (norm_by_sum, "The squares are summed"),
    ],
    "feed_forward": [
        (lambda x, w, b, v, c: x @ w @ v + b @ v + c, "no maximum with 0"),
        (lambda x, w, b, v, c: F.relu(F.linear(x @ w + b, v.T, c)), "after the second product"),
        (lambda x, w, b, v, c: (F.relu(x @ w + b) @ v + c).clamp(min=0), "second maximum"),
        (lambda x, w, b, v, c: (x.clamp(min=0) @ w + b) @ v + c, "applied to the input"),
        (lambda x, w, b, v, c: F.linear((x @ w).relu(), v.T, c), "The first bias is missing"),
        (lambda x, w, b, v, c: (x @ w + b).relu() @ v, "The second bias is missing"),
        (lambda x, w, b, v, c: (x @ w).relu() @ v, "Both biases are missing"),
        (lambda x, w, b, v, c: ((x @ w).relu() + b) @ v + c, "added after the maximum"),
        (lambda x, w, b, v, c: F.gelu(x @ w + b) @ v + c, "This is GELU"),
        (lambda x, w, b, v, c: (x @ w + b).relu() @ v + c + x, "residual sum is made outside"),
    ],
    "residual_blocks": [
        (lambda x, f, n: (x + f(n(x)), n(x + f(x))), "have changed places"),
        (lambda x, f, n: (x + n(f(x)), x + f(n(x))), "before the sum. It should see the sum"),
        (lambda x, f, n: (n(f(x)), x + f(n(x))), "Post-norm: the skip is missing"),
        (lambda x, f, n: (n(x + f(x)), n(x) + f(n(x))), "the residual path is normalised too"),
        (lambda x, f, n: (n(x + f(x)), f(n(x))), "Pre-norm: without the skip"),
        (lambda x, f, n: (n(x + f(x)), x + n(f(x))), "behind the sublayer instead of before"),
        (lambda x, f, n: (n(x + f(x)), n(x + f(n(x)))), "so the stream is not free"),
        (
            lambda x, f, n: (n(f(x)), f(n(x))),
            "x is not added. Pre-norm: without the skip",
        ),
    ],
    "teacher_forcing": [
        (forcing_template(lambda y, s, p: F.pad(y, (-1, 1), value=p)), "shifted to the left"),
        (forcing_template(lambda y, s, p: y + 0), "The inputs are not shifted"),
        (forcing_template(lambda y, s, p: torch.roll(y, 1, dims=1)), "come round to the front"),
        (forcing_template(lambda y, s, p: F.pad(y, (1, -1), value=p)), "with the padding token"),
        (forcing_template(lambda y, s, p: F.pad(y, (1, -1))), "with 0 whatever"),
        (
            forcing_template(lambda y, s, p: late(torch.where(y == p, -100, y), s, p)),
            "The inputs hold -100",
        ),
        (forcing_template(late, lambda y, first, right: y + 0), "left in the labels"),
        (forcing_template(late, lambda y, first, right: first + 0), "start_id is asked for"),
        (
            forcing_template(late, lambda y, first, right: F.pad(right, (-1, 1), value=-100)),
            "together they skip a token",
        ),
        (
            forcing_template(lambda y, s, p: y[:, :-1], lambda y, first, right: right[:, 1:]),
            "as for a decoder that has no start token",
        ),
        (
            forcing_template(lambda y, s, p: y[:, :-1], lambda y, first, right: y[:, 1:]),
            "a target that begins with a start token",
        ),
        (forcing_template(lambda y, s, p: torch.hstack((s, y))), "one longer than the labels"),
    ],
    "three_masks": [
        (
            masks_template(cross=lambda s, t, S, T: torch.ones(T, S).tril().bool() & s[:, None]),
            "Cross-attention: it is causal",
        ),
        (
            masks_template(cross=lambda s, t, S, T: t[:, :, None].repeat(1, 1, S)),
            "the padding is that of the target",
        ),
        (
            masks_template(cross=lambda s, t, S, T: torch.ones(len(s), T, S).bool()),
            "Cross-attention: the padding of the source",
        ),
        (
            masks_template(cross=lambda s, t, S, T: s[:, :, None].repeat(1, 1, T)),
            "its axes have changed places",
        ),
        (
            masks_template(decoder=lambda s, t, S, T: t[:, None].repeat(1, T, 1)),
            "Decoder: it can see the future",
        ),
        (
            masks_template(
                decoder=lambda s, t, S, T: torch.ones(len(t), T, T, dtype=torch.bool).tril()
            ),
            "Decoder: the padding of the target can be seen",
        ),
        (
            masks_template(decoder=lambda s, t, S, T: torch.ones(T, T).triu().bool() & t[:, None]),
            "the triangle is turned over",
        ),
        (
            masks_template(
                decoder=lambda s, t, S, T: torch.ones(T, T).tril(-1).bool() & t[:, None]
            ),
            "a position cannot see itself",
        ),
        (
            masks_template(encoder=lambda s, t, S, T: torch.ones(S, S).tril().bool() & s[:, None]),
            "Encoder: it is causal",
        ),
        (
            masks_template(encoder=lambda s, t, S, T: torch.ones(len(s), S, S).bool()),
            "Encoder: the padding of the source can be seen",
        ),
        (
            masks_template(encoder=lambda s, t, S, T: s[:, None] & s[..., None]),
            "Encoder: padding loses its rows too",
        ),
        (
            masks_template(
                encoder=lambda s, t, S, T: s[:, None] & s[..., None],
                decoder=lambda s, t, S, T: (t[:, None] & t[..., None]).tril(),
                cross=lambda s, t, S, T: torch.einsum("bt,bs->bts", t.int(), s.int()).bool(),
            ),
            "Decoder: padding loses its rows. Hide",
        ),
        (
            masks_template(cross=lambda s, t, S, T: s[:, None] & t[..., None]),
            "Cross-attention: the target's padding loses its rows",
        ),
        (
            masks_template(
                encoder=lambda s, t, S, T: torch.ones(S, S).tril().bool() & s[:, None],
                decoder=lambda s, t, S, T: t[:, None].repeat(1, T, 1),
            ),
            "known in full. Decoder: it can see the future",
        ),
    ],
    "tied_embedding": [
        (lambda i, h, w: (F.embedding(i, w), h @ w.mT), "not scaled by sqrt(D)"),
        (lambda i, h, w: (w[i] * w.shape[1] ** -0.5, h @ w.mT), "is divided by sqrt(D) instead"),
        (lambda i, h, w: (w[i] * w.shape[1], h @ w.mT), "multiplied by D instead"),
        (lambda i, h, w: (w[i] * len(w) ** 0.5, h @ w.mT), "the square root of V"),
        (
            lambda i, h, w: ((w * w.shape[1] ** 0.5)[i], h @ (w * w.shape[1] ** 0.5).T),
            "The logits are scaled as well",
        ),
        (
            lambda i, h, w: (w[i] * w.shape[1] ** 0.5, h @ w.T / w.shape[1] ** 0.5),
            "as scores of attention are",
        ),
        (
            lambda i, h, w: (w[i] * w.shape[1] ** 0.5, torch.softmax(h @ w.T, 2)),
            "went through a softmax",
        ),
    ],
    "base_parameters": [
        ((E - 4608, Dd - 6656, W, 6 * (E - 4608 + Dd - 6656) + W), "the biases of the projections"),
        ((E - 2048, Dd - 3072, W, M - 6 * 5120), "the norms are missing"),
        ((3_145_728, 4_194_304, W, 62_984_192), "both the biases and the norms"),
        ((E - 262_656, Dd - 525_312, W, M - 6 * 787_968), "output projection of attention"),
        ((E + 7 * 1_050_624, Dd, W, M), "once for each head"),
        ((E, E, W, 12 * E + W), "the second attention is missing"),
        ((E, Dd - 1024, W, M - 6144), "it has three norms"),
        ((E, Dd, 3 * W, M + 2 * W), "counted three times"),
        ((E, Dd, W, M + W), "counts the table twice"),
        ((E, Dd, W, M - W), "without the table"),
        ((E, Dd, W, 65_000_000), "the paper's rounded number"),
        ((E, Dd, W, 3 * (E + Dd) + W), "three of each are counted"),
    ],
    "smoothed_loss": [
        (
            loss_template(
                lambda hot, eps, V: torch.where(hot > 0, 1 - eps, eps / (V - 1)), token_mean
            ),
            "among the V - 1 other tokens",
        ),
        (loss_template(lambda hot, eps, V: hot, token_mean), "There is no smoothing"),
        (loss_template(lambda hot, eps, V: hot + eps / V, token_mean), "sums to more than 1"),
        (loss_template(lambda hot, eps, V: (1 - eps) * hot + eps, token_mean), "whole smoothing"),
        (
            loss_template(lambda hot, eps, V: eps * hot + (1 - eps) / V, token_mean),
            "The two weights have changed places",
        ),
        (
            loss_template(right_weights, lambda loss, real: (loss * real).mean()),
            "divided by all B · T positions",
        ),
        (loss_template(right_weights, lambda loss, real: loss.mean()), "as if their label were"),
        (
            loss_template(
                right_weights, lambda loss, real: ((loss * real).sum(1) / real.sum(1)).mean()
            ),
            "Each sequence is averaged first",
        ),
        (loss_template(right_weights, lambda loss, real: loss[real].sum()), "The mean is asked"),
        (loss_template(right_weights, lambda loss, real: -loss[real].mean()), "sign is turned"),
        (
            loss_template(right_weights, lambda loss, real: loss[real].mean() / math.log(2)),
            "that to base 2",
        ),
        (
            loss_template(right_weights, token_mean, dim=1),
            "The softmax runs over the positions",
        ),
        (
            loss_template(lambda hot, eps, V: (1 - eps) * hot, token_mean),
            "The smoothed part is missing",
        ),
    ],
    "paper_schedule": [
        (lambda t, D, w: max(1 / t**0.5, t / w**1.5) / D**0.5, "the larger of the two terms"),
        (lambda t, D, w: min(1 / t**0.5, t / w**1.5), "the width, 1/sqrt(D), is missing"),
        (lambda t, D, w: min(1 / t**0.5, t / w**1.5) * D**0.5, "multiplied by sqrt(D) instead"),
        (lambda t, D, w: min(1 / t**0.5, t / w**1.5) / D, "divided by D, not by its square root"),
        (lambda t, D, w: schedule_by_branches(t + 1, D, w), "used with step + 1"),
        (lambda t, D, w: (D * t) ** -0.5, "There is no warm-up"),
        (lambda t, D, w: t / (w * (w * D) ** 0.5), "only the warm-up"),
        (lambda t, D, w: min(1 / t**0.5, t / w**0.5) / D**0.5, "It takes -3/2"),
        (lambda t, D, w: min(1 / t**0.5, t / w) / D**0.5, "The line is step / warmup"),
        (
            lambda t, D, w: (1 / t**0.5 if t > w else t / w**0.5) / D**0.5,
            "The line rises as step",
        ),
        (lambda t, D, w: schedule_by_branches(t, D, 4000), "4000 steps whatever warmup is"),
    ],
    "greedy_decode": [
        (greedy_template(stop="any"), "when the first row has ended"),
        (greedy_template(stop="never"), "It always takes n_max steps. Stop"),
        (greedy_template(carry="words"), "go on writing words. After its end"),
        (greedy_template(carry="words", stop="never"), "words, and it always takes"),
        (greedy_template(carry="eos"), "are filled with eos_id"),
        (greedy_template(cut=0), "The start token is returned"),
        (greedy_template(read=0), "read off the first position"),
        (greedy_template(newest=True), "only the newest token"),
        (greedy_template(extra=1), "one step more than n_max"),
        (greedy_template(extra=-1), "one step before n_max"),
        (greedy_template(inside=True), "The encoder is called again in each step"),
        (greedy_template(carry="words", stop="same step"), "say eos_id in the same step"),
        (greedy_template(carry="words", extra=30), "n_max is no limit"),
        (greedy_template(extra=30), "It goes on beyond n_max steps"),
    ],
    "fix_decoder_layer": [
        (wiring_template(causal=False), "One mistake is left: the decoder's own"),
        (wiring_template(memory_side=False), "One mistake is left: cross-attention takes"),
        (wiring_template(skip=False), "One mistake is left: the sum around"),
        (wiring_template(own_norm=False), "One mistake is left: the last sum"),
        (wiring_template(hidden=False), "sees the padding of the source"),
        (
            wiring_template(causal=False, own_norm=False),
            "Two mistakes are left: the decoder's own attention sees the future; the last sum",
        ),
        (
            wiring_template(memory_side=False, skip=False, own_norm=False),
            "Three mistakes are left: cross-attention takes",
        ),
    ],
}
