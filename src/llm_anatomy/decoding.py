"""From logits to text: filters, sampling, greedy, beam and contrastive search.

Nothing here knows a model. A search asks a `Reader` for the logits of the next token; how the
reader makes them, with a cache or by reading everything again, is its own affair. A filter is a
function of logits that gives logits, so filters compose.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_anatomy.cache import KVCache

Filter = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, V) and the tokens so far (B, T) to logits (B, V); -inf forbids a token."""

Pick = Callable[[Tensor], Tensor]
"""From logits (B, V) to one token a row, (B,)."""


@runtime_checkable
class Reader(Protocol):
    """What a search needs of a model."""

    def read(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """Take in the next T tokens of each row, and score the token after them."""
        ...

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Go on with these rows of the batch, in this order; a row may be taken twice."""
        ...


class Rereading:
    """Reads the whole sequence again for each new token: no cache, for any model.

    Args:
        logits_of: from all tokens (B, T) to logits (B, T, V).
    """

    def __init__(self, logits_of: Callable[[Tensor], Tensor]) -> None:
        self.logits_of = logits_of
        self.tokens: Tensor | None = None

    def read(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=1)
        return self.logits_of(self.tokens)[:, -1]

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        self.tokens = self.tokens[rows]


class Cached:
    """Reads only what is new; the rest is in the model's caches.

    Args:
        logits_of: from new tokens (B, T) and the caches to logits (B, T, V), of which only the last
            position is used (so it may be the only one computed).
        caches: the model's empty caches, in lists or tuples of any depth.
    """

    def __init__(
        self, logits_of: Callable[[Tensor, Sequence], Tensor], caches: Sequence[KVCache | Sequence]
    ) -> None:
        self.logits_of = logits_of
        self.caches = caches

    def read(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        return self.logits_of(tokens, self.caches)[:, -1]

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        for cache in _flat(self.caches):
            cache.reorder(rows)


def _flat(caches: KVCache | Sequence) -> Iterator[KVCache]:
    if isinstance(caches, KVCache):
        yield caches
    else:
        for cache in caches:
            yield from _flat(cache)


def lay_lengthwise(model: nn.Module) -> None:
    """Store each matrix of a model along its longer side, in place; values and shapes stay.

    Decoding multiplies each matrix by one vector, which costs the time that reading it takes, and
    memory gives long runs faster than short ones. PyTorch stores along the input side, which is
    the shorter one wherever a layer widens and in the output layer. Square matrices are stored
    along the output side, where a product adds columns up instead of summing each row.

    It is for decoding alone: the gradient of an embedding that lies otherwise than the tokens read
    it makes a training step take about twice the time.
    """
    for p in model.parameters():
        if p.ndim == 2:
            along_input = p.shape[1] > p.shape[0]
            p.data = p.data.contiguous() if along_input else p.data.T.contiguous().T


# --- Filters -------------------------------------------------------------------------------------


def temperature(tau: float) -> Filter:
    """Divide the logits by tau: below 1 sharpens the distribution, above 1 flattens it.

    Raises:
        ValueError: tau is not above 0; the limit at 0 is `greedy`.
    """
    if not tau > 0:
        raise ValueError(f"the temperature must be above 0, got {tau}; its limit at 0 is greedy")
    return lambda logits, tokens: logits / tau


def top_k(k: int) -> Filter:
    """Leave the k most likely tokens, and those as likely as the k-th.

    Fan et al., 2018 (arXiv:1805.04833).

    Raises:
        ValueError: k is smaller than 1.
    """
    if k < 1:
        raise ValueError(f"at least one token must be left, got k = {k}")

    def leave(logits: Float[Tensor, "B V"], tokens: Tensor) -> Float[Tensor, "B V"]:
        kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        return logits.masked_fill(logits < kth, float("-inf"))

    return leave


def top_p(p: float) -> Filter:
    """Leave the smallest set of most likely tokens that together have probability p.

    Nucleus sampling: Holtzman et al., 2020 (arXiv:1904.09751).

    Raises:
        ValueError: p lies outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must lie in (0, 1], got {p}")

    def leave(logits: Float[Tensor, "B V"], tokens: Tensor) -> Float[Tensor, "B V"]:
        probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)  # (B, V)
        before = probabilities.cumsum(dim=-1) - probabilities  # held by likelier tokens
        drop = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before >= p)
        return logits.masked_fill(drop, float("-inf"))

    return leave


def min_p(p: float) -> Filter:
    """Leave the tokens with at least p times the probability of the most likely one.

    Nguyen et al., 2024 (arXiv:2407.01082).

    Raises:
        ValueError: p lies outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}")

    def leave(logits: Float[Tensor, "B V"], tokens: Tensor) -> Float[Tensor, "B V"]:
        probabilities = logits.softmax(dim=-1)
        floor = p * probabilities.amax(dim=-1, keepdim=True)  # (B, 1)
        return logits.masked_fill(probabilities < floor, float("-inf"))

    return leave


def repetition_penalty(theta: float) -> Filter:
    """Make each token that has occurred less likely: positive logits / theta, negative * theta.

    Keskar et al., 2019 (arXiv:1909.05858), section 4.1, in the form of its code, which treats
    negative logits so that theta above 1 never helps a token. The prompt counts as well.

    Raises:
        ValueError: theta is not above 0.
    """
    if not theta > 0:
        raise ValueError(f"theta must be above 0 (1 changes nothing), got {theta}")

    def weaken(logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        seen = logits.gather(-1, tokens)  # (B, T)
        return logits.scatter(-1, tokens, torch.where(seen > 0, seen / theta, seen * theta))

    return weaken


def no_repeat_ngram(n: int) -> Filter:
    """Forbid each token that would complete an n-gram which has occurred before.

    Paulus et al., 2018 (arXiv:1705.04304), section 2.5, for n = 3.

    Raises:
        ValueError: n is smaller than 1.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least one token, got n = {n}")

    def forbid(logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        T = tokens.shape[1]
        if n > T:
            return logits
        windows = tokens.unfold(1, n, 1)  # (B, T - n + 1, n)
        context = tokens[:, None, T - n + 1 :]  # (B, 1, n - 1): what the next token would follow
        again = (windows[:, :, :-1] == context).all(dim=-1)  # (B, T - n + 1)
        banned = torch.zeros_like(logits, dtype=torch.long)
        banned.scatter_add_(-1, windows[:, :, -1], again.long())
        return logits.masked_fill(banned > 0, float("-inf"))

    return forbid


# --- One token after another ---------------------------------------------------------------------


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """Pick the most likely token, the first of equals."""
    return logits.argmax(dim=-1)


def sample(generator: torch.Generator | None = None) -> Pick:
    """Make a picker that draws a token with its probability."""

    def pick(logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]

    return pick


def check_prompt(prompt: Int[Tensor, "B T"]) -> None:
    """Refuse what no search can go on from.

    Raises:
        ValueError: the prompt is not (B, T) of integers, or holds no token.
    """
    if prompt.ndim != 2 or prompt.dtype.is_floating_point or prompt.numel() == 0:
        raise ValueError(
            "a prompt is a matrix of token ids (batch, positions) with at least one token; "
            f"got {prompt.dtype} of shape {tuple(prompt.shape)}"
        )


def stream(
    reader: Reader,
    prompt: Int[Tensor, "B T"],
    *,
    pick: Pick = greedy,
    filters: Sequence[Filter] = (),
) -> Iterator[Int[Tensor, " B"]]:
    """Yield the next token of each row, without end; the caller decides when to stop.

    Raises:
        ValueError: there is no prompt, or the filters forbid every token.
    """
    check_prompt(prompt)
    tokens, new = prompt, prompt
    while True:
        with torch.inference_mode():
            logits = reader.read(new)  # (B, V)
            for change in filters:
                logits = change(logits, tokens)
            if filters and (logits.amax(dim=-1) == float("-inf")).any():
                raise ValueError("the filters forbid every token of the vocabulary")
            token = pick(logits)
        yield token
        new = token[:, None]
        tokens = torch.cat((tokens, new), dim=1)


def generate(
    reader: Reader,
    prompt: Int[Tensor, "B T"],
    n_new: int,
    *,
    pick: Pick = greedy,
    filters: Sequence[Filter] = (),
    end_id: int | None = None,
    pad_id: int | None = None,
) -> Int[Tensor, "B L"]:
    """Continue each row by up to `n_new` tokens.

    Args:
        reader: fresh; it reads the prompt first.
        prompt: token ids; of an encoder-decoder, the decoder's start token.
        n_new: most tokens to add.
        pick: how a token is chosen of the filtered logits.
        filters: applied in this order.
        end_id: a row is over after this token.
        pad_id: fills the rows that are over, `end_id` unless given.

    Returns:
        The prompt with what follows; the longest row sets the length.

    Raises:
        ValueError: there is no prompt, `n_new` is negative, or the filters forbid every token.
    """
    check_prompt(prompt)
    if n_new < 0:
        raise ValueError(f"the number of new tokens cannot be negative, got {n_new}")
    pad_id = end_id if pad_id is None else pad_id
    columns = [prompt]
    over = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    tokens = stream(reader, prompt, pick=pick, filters=filters)
    for _ in range(n_new):
        token = next(tokens)
        if end_id is not None:
            token = token.masked_fill(over, pad_id)
            over = over | (token == end_id)
        columns.append(token[:, None])
        if end_id is not None and over.all():
            break
    return torch.cat(columns, dim=1)


# --- Search --------------------------------------------------------------------------------------


@torch.inference_mode()
def beam_search(
    reader: Reader,
    prompt: Int[Tensor, "B T"],
    n_new: int,
    *,
    width: int,
    length_penalty: float = 1.0,
    end_id: int | None = None,
    pad_id: int | None = None,
) -> tuple[Int[Tensor, "B L"], Float[Tensor, " B"]]:
    """Keep the `width` likeliest beginnings of each row, and return the best that is complete.

    A complete text of n new tokens is judged by its log-probability / n^length_penalty. The search
    of a row ends when no beginning can beat the worst of `width` complete texts any more, judged as
    if it ended now; this is the rule of transformers without early stopping.

    Args:
        reader: fresh; it reads the prompt first, `width` times over.
        prompt: token ids.
        n_new: most tokens to add, at least 1; what has not ended by then counts as complete.
        width: number of beams; 1 is greedy search.
        length_penalty: above 0 favours longer texts, since log-probabilities are negative.
        end_id: ends a text.
        pad_id: fills shorter rows, `end_id` unless given.

    Returns:
        The prompt with the best continuation, and its score in nats.

    Raises:
        ValueError: there is no prompt, or `n_new` or `width` is smaller than 1.
    """
    check_prompt(prompt)
    if n_new < 1 or width < 1:
        raise ValueError(f"n_new and width must be at least 1, got {n_new} and {width}")
    B = len(prompt)
    tokens = prompt.repeat_interleave(width, dim=0)  # (B * W, T)
    total = prompt.new_zeros(B, width, dtype=torch.float32)
    total[:, 1:] = float("-inf")  # the beams of a row begin alike: only the first may branch
    complete: list[list[tuple[float, Tensor]]] = [[] for _ in range(B)]
    over = [False] * B
    new = tokens
    for n in range(1, n_new + 1):
        log_p = reader.read(new).float().log_softmax(dim=-1)  # (B * W, V)
        V = log_p.shape[-1]
        scores = (total.view(-1, 1) + log_p).view(B, width * V)
        best, where = scores.topk(min(2 * width, width * V), dim=-1)  # enough if width of them end
        rows, ids, sums = [], [], []
        for b in range(B):
            going: list[tuple[int, int, float]] = []
            candidates = zip(best[b].tolist(), where[b].tolist(), strict=True)
            for rank, (score, index) in enumerate(candidates):
                row, token = b * width + index // V, index % V
                if token == end_id or n == n_new:
                    if rank < width and not over[b]:
                        text = torch.cat((tokens[row], tokens.new_tensor([token])))
                        complete[b].append((score / n**length_penalty, text))
                elif len(going) < width:
                    going.append((row, token, score))
            complete[b] = sorted(complete[b], key=lambda pair: -pair[0])[:width]
            while len(going) < width:  # a tiny vocabulary: fill up with what cannot win
                going.append((b * width, 0, float("-inf")))
            over[b] |= (
                len(complete[b]) == width and going[0][2] / n**length_penalty <= complete[b][-1][0]
            )
            rows += [row for row, _, _ in going]
            ids += [token for _, token, _ in going]
            sums.append([score for _, _, score in going])
        if n == n_new or all(over):
            break
        kept = tokens.new_tensor(rows)
        reader.keep(kept)
        new = tokens.new_tensor(ids)[:, None]  # (B * W, 1)
        tokens = torch.cat((tokens[kept], new), dim=1)
        total = total.new_tensor(sums)
    texts = [row[0][1] for row in complete]
    fill = 0 if end_id is None and pad_id is None else end_id if pad_id is None else pad_id
    found = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=fill)
    return found, total.new_tensor([row[0][0] for row in complete])


@torch.inference_mode()
def contrastive_search(
    states_and_logits: Callable[[Tensor], tuple[Tensor, Tensor]],
    prompt: Int[Tensor, "B T"],
    n_new: int,
    *,
    k: int,
    alpha: float,
) -> Int[Tensor, "B L"]:
    """Choose among the k likeliest tokens the one whose state is least like an earlier state.

    Su et al., 2022 (arXiv:2202.06417), equation 5: the token with the largest
    (1 - alpha) * probability - alpha * (largest cosine of its state with an earlier one).

    Args:
        states_and_logits: from tokens (B, T) to last hidden states (B, T, D) and logits (B, T, V).
        prompt: token ids.
        n_new: tokens to add.
        k: candidates.
        alpha: weight of the penalty; 0 is greedy search.

    Raises:
        ValueError: there is no prompt, k is smaller than 1, or alpha lies outside [0, 1].
    """
    check_prompt(prompt)
    if k < 1 or not 0 <= alpha <= 1:
        raise ValueError(f"need k of at least 1 and alpha in [0, 1], got {k} and {alpha}")
    tokens = prompt
    for _ in range(n_new):
        B = len(tokens)
        probability, ids = states_and_logits(tokens)[1][:, -1].softmax(dim=-1).topk(k)  # (B, k)
        tried = torch.cat((tokens.repeat_interleave(k, dim=0), ids.reshape(-1, 1)), dim=1)
        states = torch.nn.functional.normalize(states_and_logits(tried)[0], dim=-1)
        likeness = (states[:, :-1] @ states[:, -1:].mT).amax(dim=(1, 2)).view(B, k)
        best = ((1 - alpha) * probability - alpha * likeness).argmax(dim=-1, keepdim=True)  # (B, 1)
        tokens = torch.cat((tokens, ids.gather(-1, best)), dim=1)
    return tokens
