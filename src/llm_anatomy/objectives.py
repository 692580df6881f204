"""What a model is trained to predict: from tokens to inputs, targets and losses.

Targets hold IGNORED where nothing is to be predicted. Whatever is drawn is drawn from a generator,
so that the same seed gives the same batch.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -100
"""The target that counts for nothing, by PyTorch's convention."""


def cross_entropy(logits: Float[Tensor, "*N V"], targets: Int[Tensor, "*N"]) -> Float[Tensor, ""]:
    """Mean of -log p(target) over the targets that count, in nats.

    Raises:
        ValueError: no target counts.
    """
    if (targets == IGNORED).all():
        raise ValueError("every target is ignored: there is nothing to average")
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


# --- From left to right --------------------------------------------------------------------------


def causal_lm(
    tokens: Int[Tensor, "B L"], keep: Bool[Tensor, "B L"] | None = None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and targets of next-token prediction: the same tokens, one position apart.

    Args:
        tokens: L = T + 1 tokens of each text.
        keep: True at real tokens; a target that is padding does not count.

    Raises:
        ValueError: there is no token after the first.
    """
    if tokens.shape[1] < 2:
        raise ValueError(f"next-token prediction needs two tokens at least, got {tokens.shape[1]}")
    targets = tokens[:, 1:].clone()
    if keep is not None:
        targets[~keep[:, 1:]] = IGNORED
    return tokens[:, :-1], targets


def prefix_lm(
    tokens: Int[Tensor, "B L"],
    n_prefix: Int[Tensor, " B"],
    keep: Bool[Tensor, "B L"] | None = None,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """As `causal_lm`, but nothing inside the prefix is predicted: there the model looks ahead.

    Raffel et al., 2020 (arXiv:1910.10683), section 3.2. Goes with `masks.prefix(n_prefix, T)`.

    Args:
        tokens: prefix and continuation.
        n_prefix: length of each prefix, between 0 and L - 1. The first token of a text has nothing
            before it and is no target either way.
        keep: True at real tokens.

    Raises:
        ValueError: a prefix leaves nothing to predict.
    """
    L = tokens.shape[1]
    if n_prefix.min() < 0 or n_prefix.max() >= L:
        raise ValueError(f"prefix lengths must lie between 0 and {L - 1}, got {n_prefix.tolist()}")
    inputs, targets = causal_lm(tokens, keep)
    predicted = torch.arange(1, L, device=tokens.device)  # position of each target in the text
    return inputs, targets.masked_fill(predicted < n_prefix[:, None], IGNORED)


# --- In both directions --------------------------------------------------------------------------


def masked_lm(
    tokens: Int[Tensor, "B T"],
    maskable: Bool[Tensor, "B T"],
    *,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    share: float = 0.15,
    masked: float = 0.8,
    replaced: float = 0.1,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Hide some tokens, and ask for them: BERT's rule of 80, 10 and 10 %.

    Devlin et al., 2019 (arXiv:1810.04805), section 3.1. Each maskable position is chosen with
    probability `share`. A chosen token becomes [MASK] in 80 % of cases, a random token in 10 %, and
    stays in 10 %; it is a target in all of them.

    Args:
        tokens: token ids.
        maskable: False at padding and at special tokens.
        mask_id: the id of [MASK].
        vocab_size: random tokens are drawn from 0 to V - 1, as in BERT's code.
        generator: source of all draws.
        share: part of the positions that are chosen.
        masked: part of the chosen ones that become [MASK].
        replaced: part of the chosen ones that become a random token.

    Raises:
        ValueError: a part lies outside [0, 1], or `masked` and `replaced` exceed 1 together.
    """
    parts = (share, masked, replaced, masked + replaced)
    if not all(0 <= part <= 1 for part in parts):
        raise ValueError(f"parts must lie in [0, 1]: share, masked, replaced, sum are {parts}")

    def draw() -> Float[Tensor, "B T"]:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    chosen = maskable & (draw() < share)
    fate = draw()
    noise = torch.randint(
        vocab_size, tokens.shape, generator=generator, device=tokens.device, dtype=tokens.dtype
    )
    inputs = torch.where(chosen & (fate < masked), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= masked) & (fate < masked + replaced), noise, inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORED)


def sentence_pairs(
    documents: Sequence[Sequence[Sequence[int]]], n: int, generator: torch.Generator
) -> tuple[list[tuple[list[int], list[int]]], Int[Tensor, " n"]]:
    """Draw pairs of sentences for next-sentence prediction.

    Devlin et al., 2019 (arXiv:1810.04805), section 3.1: half of the second sentences are those that
    follow, half come from another document. Label 0 means "follows", as in BERT's checkpoints.

    Args:
        documents: each a list of at least two sentences, each a list of token ids.
        n: pairs to draw.
        generator: source of all draws.

    Returns:
        The pairs and their labels.

    Raises:
        ValueError: fewer than two documents, or one with fewer than two sentences.
    """
    if len(documents) < 2 or min(map(len, documents)) < 2:
        raise ValueError("next-sentence prediction needs two documents of two sentences at least")

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    pairs, labels = [], torch.randint(2, (n,), generator=generator)
    for label in labels.tolist():
        here = below(len(documents))
        first = below(len(documents[here]) - 1)
        if label == 0:
            second = documents[here][first + 1]
        else:
            other = (here + 1 + below(len(documents) - 1)) % len(documents)
            second = documents[other][below(len(documents[other]))]
        pairs.append((list(documents[here][first]), list(second)))
    return pairs, labels


# --- From a damaged text to the whole one --------------------------------------------------------


def random_spans(
    n_tokens: int, generator: torch.Generator, *, share: float = 0.15, mean_length: float = 3.0
) -> list[tuple[int, int]]:
    """Draw spans that cover a share of a text, none touching another: [(start, end), …].

    As in T5's code: the number of hidden tokens and of spans is fixed, round(share * n) and
    round(hidden / mean_length), at least 1 each; both the hidden and the visible tokens are cut
    into that many parts at random, which alternate, a visible part first.

    Raises:
        ValueError: fewer than two tokens, or a share outside (0, 1).
    """
    if n_tokens < 2 or not 0 < share < 1 or mean_length < 1:
        raise ValueError(
            f"need two tokens, a share in (0, 1) and a mean length of 1 at least, "
            f"got {n_tokens}, {share} and {mean_length}"
        )
    hidden = min(max(round(n_tokens * share), 1), n_tokens - 1)
    spans = min(max(round(hidden / mean_length), 1), n_tokens - hidden)

    def parts(total: int) -> list[int]:
        """Cut `total` into `spans` parts of at least 1, all ways equally likely."""
        cuts = torch.randperm(total - 1, generator=generator)[: spans - 1].sort().values + 1
        edges = [0, *cuts.tolist(), total]
        return [end - start for start, end in itertools.pairwise(edges)]

    found, at = [], 0
    for visible, length in zip(parts(n_tokens - hidden), parts(hidden), strict=True):
        found.append((at + visible, at + visible + length))
        at += visible + length
    return found


def corrupt_spans(
    tokens: Sequence[int],
    spans: Sequence[tuple[int, int]],
    sentinels: Sequence[int],
    end_id: int,
) -> tuple[list[int], list[int]]:
    """Replace each span by a sentinel; the target gives the sentinels with what they replaced.

    Raffel et al., 2020 (arXiv:1910.10683), figure 2, with the paper's final sentinel and the end
    token of T5's checkpoints after it.

    Args:
        tokens: a text.
        spans: (start, end) of each, in order, not touching.
        sentinels: their ids, in order of use; one more than there are spans.
        end_id: ends the input and the target.

    Raises:
        ValueError: too few sentinels, or spans that are empty, out of order, touch, or lie outside.
    """
    if len(sentinels) < len(spans) + 1:
        raise ValueError(f"{len(spans)} spans need {len(spans) + 1} sentinels: {len(sentinels)}")
    source, target, at = [], [], 0
    for number, (start, end) in enumerate(spans):
        if not (at < start or at == start == 0) or not start < end <= len(tokens):
            raise ValueError(
                f"span {number} ({start} to {end}) must be in order, apart, and inside "
                f"{len(tokens)} tokens"
            )
        source += [*tokens[at:start], sentinels[number]]
        target += [sentinels[number], *tokens[start:end]]
        at = end
    return [*source, *tokens[at:], end_id], [*target, sentinels[len(spans)], end_id]


def restore_spans(source: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> list:
    """Put the spans of a target back into its source: the inverse of `corrupt_spans`.

    Raises:
        ValueError: a sentinel of the source is not in the target.
    """
    known = set(sentinels)
    parts: dict[int, list[int]] = {}
    for token in target[:-1]:  # without the end token
        if token in known:
            current = parts.setdefault(token, [])
        else:
            current.append(token)
    missing = [token for token in source if token in known and token not in parts]
    if missing:
        raise ValueError(f"the target lacks the sentinels {missing}")
    whole: list[int] = []
    for token in source[:-1]:
        whole += parts[token] if token in known else [token]
    return whole


def infill_text(
    tokens: Sequence[int],
    mask_id: int,
    generator: torch.Generator,
    *,
    share: float = 0.3,
    mean_length: float = 3.0,
) -> list[int]:
    """Replace spans of Poisson-distributed length by one [MASK] each: BART's text infilling.

    Lewis et al., 2020 (arXiv:1910.13461), section 2.2. A span of length 0 inserts a [MASK]. Lengths
    are drawn until they hide round(share * n) tokens, the last one cut to fit; between two spans
    stands a visible token, so that each reads as one [MASK]. The target is the whole text.

    Raises:
        ValueError: the share lies outside [0, 1], or the mean length is not above 0.
    """
    if not 0 <= share <= 1 or not mean_length > 0:
        raise ValueError(
            f"need a share in [0, 1] and a mean length above 0, got {share} and {mean_length}"
        )
    budget = round(share * len(tokens))
    mean = torch.tensor(mean_length)
    lengths: list[int] = []
    while sum(lengths) < budget:
        drawn = int(torch.poisson(mean, generator=generator))
        lengths.append(min(drawn, budget - sum(lengths)))
    # A slot is a place before, between or after the visible tokens; a slot holds one span at most.
    slots = len(tokens) - budget + 1
    spans = [length for length in lengths if length]
    if len(spans) > slots:
        spans = [*spans[: slots - 1], sum(spans[slots - 1 :])]
    places = torch.randperm(slots, generator=generator)[: len(spans)].sort().values.tolist()
    span_at = dict(zip(places, spans, strict=True))
    inserted = torch.randint(slots, (lengths.count(0),), generator=generator).tolist()
    result, at = [], 0
    for slot in range(slots):
        result += [mask_id] * (inserted.count(slot) + (slot in span_at))
        at += span_at.get(slot, 0)
        result += tokens[at : at + 1] if slot < slots - 1 else []
        at += 1
    return result


def permute_sentences(
    sentences: Sequence[Sequence[int]], generator: torch.Generator
) -> list[list[int]]:
    """Shuffle the sentences of a document: BART's other noise.

    Lewis et al., 2020 (arXiv:1910.13461), section 2.2.
    """
    order = torch.randperm(len(sentences), generator=generator).tolist()
    return [list(sentences[i]) for i in order]


# --- From a teacher ------------------------------------------------------------------------------


def soft_targets(
    student: Float[Tensor, "*N V"],
    teacher: Float[Tensor, "*N V"],
    temperature: float = 1.0,
    counted: Bool[Tensor, "*N"] | None = None,
) -> Float[Tensor, ""]:
    """How far a student's softened distributions are from a teacher's: T² KL(teacher || student).

    Hinton et al., 2015 (arXiv:1503.02531), section 2. Both logits are divided by the temperature T,
    which shrinks the gradient by about T²; the factor undoes it, so that a mixture with hard labels
    keeps its proportions when T changes. As T grows, the gradient becomes that of half the mean
    squared difference of the centred logits. No gradient reaches the teacher.

    Args:
        student: its logits.
        teacher: logits for the same inputs, over the same V tokens.
        temperature: T; at 1 the minimum is reached by the teacher's own distribution, as at any T.
        counted: True where a position counts, everywhere unless given.

    Returns:
        The mean over the positions that count, in nats. It is 0 where both agree.

    Raises:
        ValueError: the shapes differ, the temperature is not above 0, or nothing counts.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be a number above 0, got {temperature}")
    student, teacher = _counted(student, teacher, counted)
    log_q = (student / temperature).log_softmax(dim=-1)
    log_p = (teacher.detach() / temperature).log_softmax(dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * kl.mean()


def distillation(
    student: Float[Tensor, "*N V"],
    teacher: Float[Tensor, "*N V"],
    targets: Int[Tensor, "*N"],
    *,
    temperature: float = 2.0,
    soft: float = 0.5,
) -> Float[Tensor, ""]:
    """Learn from a teacher and from labels: soft * `soft_targets` + (1 - soft) * `cross_entropy`.

    Hinton et al., 2015 (arXiv:1503.02531), section 2.

    Args:
        student: its logits.
        teacher: logits for the same inputs.
        targets: the labels; both losses count the positions that have one.
        temperature: softens the first loss alone.
        soft: share of the first loss.

    Raises:
        ValueError: as `soft_targets` and `cross_entropy`, or the share lies outside [0, 1].
    """
    if not 0 <= soft <= 1:
        raise ValueError(f"the share of the soft targets must lie in [0, 1], got {soft}")
    from_teacher = soft_targets(student, teacher, temperature, targets != IGNORED)
    return soft * from_teacher + (1 - soft) * cross_entropy(student, targets)


def hidden_cosine(
    student: Float[Tensor, "*N D"],
    teacher: Float[Tensor, "*N D"],
    counted: Bool[Tensor, "*N"] | None = None,
) -> Float[Tensor, ""]:
    """1 - cosine between the hidden states of student and teacher, on average: DistilBERT's.

    Sanh et al., 2019 (arXiv:1910.01108), section 2. Directions are compared, lengths are not. No
    gradient reaches the teacher.

    Raises:
        ValueError: the shapes differ, or nothing counts.
    """
    student, teacher = _counted(student, teacher, counted)
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=-1).mean()


def hidden_mse(
    student: Float[Tensor, "*N D"],
    teacher: Float[Tensor, "*N E"],
    counted: Bool[Tensor, "*N"] | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference between the hidden states of student and teacher.

    Jiao et al., 2020 (arXiv:1909.10351), equation 8: a student of another width is compared through
    a linear map, which is trained with it and then thrown away. Maps of attention weights are
    compared in the same way. No gradient reaches the teacher.

    Args:
        student: its hidden states.
        teacher: those of the teacher.
        counted: True where a position counts, everywhere unless given.
        projection: from the student's width to the teacher's.

    Raises:
        ValueError: the shapes differ (after the projection), or nothing counts.
    """
    if projection is not None:
        student = projection(student)
    student, teacher = _counted(student, teacher, counted)
    return F.mse_loss(student, teacher.detach())


def _counted(student: Tensor, teacher: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """The vectors of both at the positions that count, (M, V)."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree in shape"
        )
    if counted is None:
        counted = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if counted.dtype != torch.bool or counted.shape != student.shape[:-1]:
        raise ValueError(
            f"what counts must be boolean and of shape {tuple(student.shape[:-1])}; "
            f"it is {counted.dtype} of shape {tuple(counted.shape)}"
        )
    if not counted.any():
        raise ValueError("no position counts: there is nothing to average")
    return student[counted], teacher[counted]
