"""ELMo (Peters et al., 2018, arXiv:1802.05365): two language models, one from each side.

Before BERT: words are spelled, recurrent layers read them from the left and from the right, and the
two meet only in the loss, a sum, and in the task's mix of the layers. The published weights are
no transformers checkpoint. What their training adds is not here: the state of a batch is carried
into the next, where here each text starts from zero, the softmax is estimated from a sample of
words, and a task may normalise each layer before it is mixed.

    elmo = Elmo(ElmoConfig(vocab_size=len(words)))
    mix = ScalarMix(elmo.config.n_layers + 1)
    vectors = mix(elmo.hidden(elmo.embed(tokens, spell(words)), keep))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy.models.checks import check_keep, check_tokens
from llm_anatomy.weights import check_fields

BEGIN, END, PADDING = 258, 259, 260  # after 256 bytes, and marks of a text's begin and end


@dataclass(frozen=True, kw_only=True)
class ElmoConfig:
    """The original model unless told otherwise.

    A filter is a pair: how many characters it spans, and how many numbers it gives. The memory of
    an LSTM is `d_cell` wide; what it says of a token is projected to `d_model`.

    Raises:
        ValueError: a field has another type than it states or is negative, or a filter is no pair
            of positive integers.
    """

    vocab_size: int = 793_471
    n_chars: int = 261
    d_char: int = 16
    filters: tuple = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    n_highway: int = 2
    n_layers: int = 2
    d_cell: int = 4096
    d_model: int = 512
    clip: float = 3.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        for pair in self.filters:
            if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
                raise ValueError(
                    f"a filter is a pair of width and number, both above 0, got {pair}"
                )


ELMO_SMALL = ElmoConfig(n_highway=1, d_cell=1024, d_model=128)
ELMO_MEDIUM = ElmoConfig(n_highway=1, d_cell=2048, d_model=256)
ELMO_ORIGINAL = ElmoConfig()


def spell(words: Sequence[str], length: int = 50) -> Int[Tensor, "N M"]:
    """The bytes of each word in UTF-8 between two marks, cut or padded to one length.

    Raises:
        ValueError: there is no word, or `length` has no place for a byte.
    """
    if not words or length < 3:
        raise ValueError(f"expected words and a length of 3 or more, got {len(words)} and {length}")
    rows = [[BEGIN, *word.encode()[: length - 2], END] for word in words]
    return torch.tensor([row + [PADDING] * (length - len(row)) for row in rows])


class Highway(nn.Module):
    """Part a new value, part the old one, as a gate decides: Srivastava et al., 2015."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.new = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
        gate = self.gate(x).sigmoid()
        return gate * self.new(x).relu() + (1 - gate) * x


class CharacterCNN(nn.Module):
    """One vector for each word, from its characters: Kim et al., 2016 (arXiv:1508.06615).

    Each filter slides over the characters, and only its largest value counts, wherever it was.
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        width = sum(n for _, n in config.filters)
        self.char_embedding = nn.Embedding(config.n_chars, config.d_char)
        self.filters = nn.ModuleList(nn.Conv1d(config.d_char, n, w) for w, n in config.filters)
        self.highways = nn.ModuleList(Highway(width) for _ in range(config.n_highway))
        self.projection = nn.Linear(width, config.d_model)

    def forward(self, chars: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        x = self.char_embedding(chars).mT  # (N, d_char, M)
        x = torch.cat([slide(x).amax(dim=-1) for slide in self.filters], dim=-1).relu()  # (N, W)
        for highway in self.highways:
            x = highway(x)
        return self.projection(x)


class TwoLstms(nn.Module):
    """A recurrent layer from the left and one from the right, side by side: direction is an axis.

    What it says of a token depends on this one and on those read before it. Hochreiter and
    Schmidhuber, 1997, with the projection of Sak et al., 2014 (arXiv:1402.1128).
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        D, C = config.d_model, config.d_cell
        self.clip = config.clip
        self.from_input = nn.Parameter(torch.empty(2, D, 4 * C))
        self.from_state = nn.Parameter(torch.empty(2, D, 4 * C))
        self.bias = nn.Parameter(torch.empty(2, 1, 4 * C))
        self.projection = nn.Parameter(torch.empty(2, C, D))

    def forward(self, x: Float[Tensor, "2 B T D"]) -> Float[Tensor, "2 B T D"]:
        B, T, D = x.shape[1:]
        memory = x.new_zeros(2, B, self.projection.shape[1])  # (2, B, C)
        state = x.new_zeros(2, B, D)
        states = []
        given = x.flatten(1, 2) @ self.from_input + self.bias  # (2, B T, 4 C)
        for gates in given.unflatten(1, (B, T)).unbind(dim=2):
            i, f, new, o = (gates + state @ self.from_state).chunk(4, dim=-1)  # (2, B, C) each
            memory = f.sigmoid() * memory + i.sigmoid() * new.tanh()
            memory = memory.clamp(-self.clip, self.clip)
            state = (o.sigmoid() * memory.tanh()) @ self.projection
            state = state.clamp(-self.clip, self.clip)
            states.append(state)
        return torch.stack(states, dim=2)


class Elmo(nn.Module):
    """The bidirectional language model: `forward` composes `embed`, `hidden` and `logits`.

    Both directions share the vectors of the words and the softmax; each has layers of its own.
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        self.config = config
        self.words = CharacterCNN(config)
        self.layers = nn.ModuleList(TwoLstms(config) for _ in range(config.n_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.d_model, config.vocab_size)
        self.initialise()

    def initialise(self) -> None:
        """Keep the scale of what passes; highways start by carrying, memories by remembering."""
        for name, p in self.named_parameters():
            if "bias" in name:
                nn.init.constant_(p, -2.0 if name.endswith("gate.bias") else 0.0)
            elif name.startswith("layers"):
                for direction in p:
                    nn.init.xavier_uniform_(direction)
            elif "embedding" not in name:
                nn.init.xavier_uniform_(p)
        for layer in self.layers:
            nn.init.ones_(layer.bias.chunk(4, dim=-1)[1])  # of the gate f

    def embed(
        self, tokens: Int[Tensor, "B T"], spelling: Int[Tensor, "N M"]
    ) -> Float[Tensor, "B T D"]:
        """The vector of each word, whatever stands around it.

        Args:
            tokens: rows of `spelling`. Those of the vocabulary, for the language model; of any
                other words, where only vectors are wanted.
            spelling: the characters of each word, as `spell` writes them.

        Raises:
            ValueError: there is no token, a token has no row, a character's id is out of range, or
                the words have fewer places than the widest filter.
        """
        check_tokens(tokens, len(spelling))
        n, widest = self.config.n_chars, max(width for width, _ in self.config.filters)
        if spelling.shape[1] < widest:
            raise ValueError(
                f"the widest filter spans {widest} characters, but words have {spelling.shape[1]} "
                "places, padding included"
            )
        if spelling.min() < 0 or spelling.max() >= n:
            raise ValueError(
                f"ids of characters must lie between 0 and {n - 1}; "
                f"got {spelling.min().item()} to {spelling.max().item()}"
            )
        return F.embedding(tokens, self.words(spelling))

    def hidden(
        self, x: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "n B T 2*D"]:
        """All n = L + 1 layers: the words twice, then the two directions side by side.

        Equation 1 of the paper counts each half of a layer, and the words once: 2 L + 1 vectors.

        Args:
            keep: True at real tokens. What stands at padding means nothing.

        Raises:
            ValueError: `keep` has another shape or type.
        """
        order = self.reading_order(x, keep)[..., None]  # (2, B, T, 1)
        x = x.expand(2, -1, -1, -1)
        x = x.gather(2, order.expand_as(x))  # (2, B, T, D)
        layers = [x]
        for layer in self.layers:
            x = self.dropout(x)
            x = layer(x) if len(layers) == 1 else x + layer(x)  # the first one stands alone
            layers.append(x)
        states = torch.stack(layers)  # (n, 2, B, T, D), as they were read
        states = states.gather(3, order.argsort(dim=2).expand_as(states))  # as they stand
        return torch.cat(states.unbind(dim=1), dim=-1)

    def reading_order(
        self, x: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"] | None
    ) -> Int[Tensor, "2 B T"]:
        """Which position is read when, from the left and from the right; padding comes last."""
        B, T = x.shape[:2]
        place = torch.arange(T, device=x.device).expand(B, T)
        when = torch.stack((place, -place))
        if keep is not None:
            check_keep(keep, B, T)
            when = when.masked_fill(~keep, T)
        return when.argsort(dim=2)

    def logits(
        self, x: Float[Tensor, "B T W"]
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T V"]]:
        """Scores of the next word, from the left half, and of the previous one, from the right."""
        from_left, from_right = self.dropout(x).chunk(2, dim=-1)
        return self.output(from_left), self.output(from_right)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        spelling: Int[Tensor, "N M"],
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T V"]]:
        return self.logits(self.hidden(self.embed(tokens, spelling), keep)[-1])


def bilm_loss(
    following: Float[Tensor, "B T V"],
    previous: Float[Tensor, "B T V"],
    tokens: Int[Tensor, "B T"],
    keep: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """-log p(next word | left) - log p(previous word | right), each a mean over words, in nats.

    Section 3.1 of the paper maximises the sum of both. A text stands between two marks, so that
    each of its words is predicted from both sides.

    Args:
        following: logits of the word after each position.
        previous: logits of the word before each position.
        keep: True at real tokens.

    Raises:
        ValueError: no two real tokens stand side by side.
    """
    keep = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep
    both = keep[:, 1:] & keep[:, :-1]  # (B, T - 1), True where both neighbours are real
    if not both.any():
        raise ValueError(f"nothing to predict: no neighbours in texts of shape {tuple(keep.shape)}")
    after = F.cross_entropy(following[:, :-1][both], tokens[:, 1:][both])
    return after + F.cross_entropy(previous[:, 1:][both], tokens[:, :-1][both])


class ScalarMix(nn.Module):
    """The task's own mean of the layers, times a gain: equation 1 of the paper.

    At the start all layers count alike.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(n_layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, layers: Float[Tensor, "n B T W"]) -> Float[Tensor, "B T W"]:
        """Weights s = softmax(scores) on the layers, in the order of `Elmo.hidden`.

        Raises:
            ValueError: the number of layers is another.
        """
        if len(layers) != len(self.scores):
            raise ValueError(f"expected {len(self.scores)} layers to mix, got {len(layers)}")
        return self.gamma * torch.tensordot(self.scores.softmax(dim=0), layers, dims=1)
