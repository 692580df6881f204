"""BERT (Devlin et al., 2019, arXiv:1810.04805): the encoder of the Transformer, alone.

Positions are learned, a third embedding says which of two segments a token is in, and GELU replaces
ReLU. Pre-training fills masked tokens in and judges whether the second segment follows the first;
every other task takes the same encoder under a small head of its own:

    pretrained = BertForPreTraining.from_pretrained(folder)
    model = BertForSequenceClassification(pretrained.config)
    model.bert, model.pooler = pretrained.bert, pretrained.pooler
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy.attention import MultiHeadAttention
from llm_anatomy.feedforward import FeedForward
from llm_anatomy.models.checks import check_context, check_options, check_tokens, padding_mask
from llm_anatomy.weights import Pretrained, Rename, Rule, check_fields


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """BERT-base, uncased, unless told otherwise.

    Reading the token `pad_id` does not train its vector. A classification head tells `n_labels`
    classes apart and drops a share `head_dropout` of what it reads.

    Raises:
        ValueError: a field has another type than it states or is negative, or `pad_id` lies outside
            the vocabulary.
    """

    vocab_size: int = 30_522
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_ff: int = 3072
    n_positions: int = 512
    n_segments: int = 2
    n_labels: int = 2
    attention_dropout: float = 0.1
    dropout: float = 0.1
    head_dropout: float = 0.1
    eps: float = 1e-12
    pad_id: int | None = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pad_id is not None and self.pad_id >= self.vocab_size:
            raise ValueError(f"pad_id ({self.pad_id}) must be below vocab_size ({self.vocab_size})")


BERT_BASE = BertConfig()
BERT_LARGE = BertConfig(n_layers=24, n_heads=16, d_model=1024, d_ff=4096)


class BertBlock(nn.Module):
    """Self-attention, then feed-forward; each is added to its input and the sum is normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            config.d_model, config.n_heads, dropout=config.attention_dropout
        )
        self.attention_norm = nn.LayerNorm(config.d_model, config.eps)
        self.ffn = FeedForward(config.d_model, config.d_ff, F.gelu)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B 1 1 T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Bert(nn.Module):
    """The encoder from token ids to one vector a token, which all models below share."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model, config.pad_id)
        self.position_embedding = nn.Embedding(config.n_positions, config.d_model)
        self.segment_embedding = nn.Embedding(config.n_segments, config.d_model)
        self.embedding_norm = nn.LayerNorm(config.d_model, config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.n_layers))

    def embed(
        self, tokens: Int[Tensor, "B T"], segments: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The sum of three vectors a token, normalised: what it is, where, and in which segment.

        Args:
            tokens: token ids.
            segments: 0 in the first segment, 1 in the second; all 0 unless given.

        Raises:
            ValueError: there is no token, an id or a segment is out of range, or the text is longer
                than the context.
        """
        check_tokens(tokens, self.config.vocab_size)
        segments = torch.zeros_like(tokens) if segments is None else segments
        if segments.min() < 0 or segments.max() >= self.config.n_segments:
            raise ValueError(
                f"segments must lie between 0 and {self.config.n_segments - 1}; "
                f"got {segments.min().item()} to {segments.max().item()}"
            )
        x = self.token_embedding(tokens) + self.segment_embedding(segments)
        return self.dropout(
            self.embedding_norm(x + self.position_embedding(self.positions(tokens)))
        )

    def positions(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "... T"]:
        """Number the tokens of each row from 0, padding included."""
        check_context(tokens.shape[1], self.config.n_positions)
        return torch.arange(tokens.shape[1], device=tokens.device)

    def hidden(
        self, x: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Run the blocks; `keep` is True at real tokens."""
        mask = padding_mask(keep, *x.shape[:2])
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        return self.hidden(self.embed(tokens, segments), keep)


class Pooler(nn.Module):
    """One vector for the whole text, from that of its first token, [CLS]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B D"]:
        return self.dense(x[:, 0]).tanh()


class MaskedLMHead(nn.Module):
    """Score every token of the vocabulary: one layer, a norm, then the token embedding again."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, config.eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, x: Float[Tensor, "B T D"], embedding: Float[Tensor, "V D"]
    ) -> Float[Tensor, "B T V"]:
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding, self.bias)


class BertPretrained(Pretrained):
    """What all checkpoints of BERT have in common. Subclasses add a head to `bert`."""

    model_type = "bert"
    hf_ignored = (".position_ids",)
    encoder: type[Bert] = Bert

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = self.encoder(config)

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> BertConfig:
        check_options(
            hf,
            {
                "hidden_act": ("gelu",),
                "position_embedding_type": ("absolute", None),
                "is_decoder": (False,),
                "tie_word_embeddings": (True,),
            },
        )
        head_dropout = hf.get("classifier_dropout")
        return BertConfig(
            vocab_size=hf["vocab_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"],
            d_model=hf["hidden_size"],
            d_ff=hf["intermediate_size"],
            n_positions=hf["max_position_embeddings"],
            n_segments=hf["type_vocab_size"],
            n_labels=len(hf.get("id2label") or range(2)),  # not stored where there are two
            attention_dropout=hf["attention_probs_dropout_prob"],
            dropout=hf["hidden_dropout_prob"],
            head_dropout=hf["hidden_dropout_prob"] if head_dropout is None else head_dropout,
            eps=hf["layer_norm_eps"],
            pad_id=hf.get("pad_token_id", 0),
        )

    @classmethod
    def config_to_hf(cls, config: BertConfig) -> dict[str, Any]:
        labels = {str(i): f"LABEL_{i}" for i in range(config.n_labels)}
        return {
            "architectures": [cls.__name__],
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "max_position_embeddings": config.n_positions,
            "type_vocab_size": config.n_segments,
            "id2label": labels,
            "label2id": {label: int(i) for i, label in labels.items()},
            "hidden_act": "gelu",
            "attention_probs_dropout_prob": config.attention_dropout,
            "hidden_dropout_prob": config.dropout,
            "classifier_dropout": config.head_dropout,
            "layer_norm_eps": config.eps,
            "pad_token_id": config.pad_id,
        }

    def load_hf(self, state: Mapping[str, Tensor]) -> "BertPretrained":
        def modern(name: str) -> str:  # the files of 2018 call a norm's parameters gamma and beta
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            return name.replace("LayerNorm.beta", "LayerNorm.bias")

        return super().load_hf({modern(name): t for name, t in state.items()})

    def initialise(self) -> None:
        """Draw matrices with standard deviation 0.02, and set biases and the padding to zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])


class BertModel(BertPretrained):
    """The encoder and its pooler, without a head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.initialise()

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D"]]:
        """One vector a token, and one for the whole text."""
        x = self.bert(tokens, segments, keep)
        return x, self.pooler(x)

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [*encoder_rules("", config), *linear("pooler.dense", "pooler.dense")]


class BertForPreTraining(BertPretrained):
    """Both tasks of pre-training: masked tokens, and whether the second segment is the next one."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.mlm = MaskedLMHead(config)
        self.nsp = nn.Linear(config.d_model, 2)
        self.initialise()

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Scores of every token of the vocabulary, at every position."""
        return self.mlm(x, self.bert.token_embedding.weight)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B 2"]]:
        """Logits of the tokens, and those of "follows" (0) and "does not follow" (1)."""
        x = self.bert(tokens, segments, keep)
        return self.logits(x), self.nsp(self.pooler(x))

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [
            *BertForMaskedLM.hf_rules(config),
            *linear("bert.pooler.dense", "pooler.dense"),
            *linear("cls.seq_relationship", "nsp"),
        ]

    @staticmethod
    def hf_tied(config: BertConfig) -> dict[str, str]:
        return BertForMaskedLM.hf_tied(config)


class BertForMaskedLM(BertPretrained):
    """Masked tokens alone: no pooler, no next-sentence prediction."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.mlm = MaskedLMHead(config)
        self.initialise()

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Scores of every token of the vocabulary, at every position."""
        return self.mlm(x, self.bert.token_embedding.weight)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        return self.logits(self.bert(tokens, segments, keep))

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [
            *encoder_rules("bert.", config),
            *linear("cls.predictions.transform.dense", "mlm.dense"),
            *linear("cls.predictions.transform.LayerNorm", "mlm.norm"),
            Rename("cls.predictions.bias", "mlm.bias"),
        ]

    @staticmethod
    def hf_tied(config: BertConfig) -> dict[str, str]:
        return {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }


class BertForSequenceClassification(BertPretrained):
    """One of `n_labels` classes for a text or a pair of texts."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.d_model, config.n_labels)
        self.initialise()

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B n_labels"]:
        return self.classifier(self.dropout(self.pooler(self.bert(tokens, segments, keep))))

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [
            *encoder_rules("bert.", config),
            *linear("bert.pooler.dense", "pooler.dense"),
            *linear("classifier", "classifier"),
        ]


class BertForTokenClassification(BertPretrained):
    """One of `n_labels` classes for each token, such as the kinds of names."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.d_model, config.n_labels)
        self.initialise()

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T n_labels"]:
        return self.classifier(self.dropout(self.bert(tokens, segments, keep)))

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [*encoder_rules("bert.", config), *linear("classifier", "classifier")]


class BertForQuestionAnswering(BertPretrained):
    """Where in the text an answer starts, and where it ends."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.span = nn.Linear(config.d_model, 2)
        self.initialise()

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Logits of every position as the first, and as the last token of the answer."""
        start, end = self.span(self.bert(tokens, segments, keep)).unbind(dim=-1)
        return start, end

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [*encoder_rules("bert.", config), *linear("qa_outputs", "span")]


def linear(theirs: str, ours: str) -> list[Rule]:
    """Weight and bias of a layer or a norm."""
    return [Rename(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]


def encoder_rules(prefix: str, config: BertConfig) -> list[Rule]:
    """The encoder, whose names start with `prefix` in the checkpoint and with `bert.` here."""
    rules: list[Rule] = [
        Rename(f"{prefix}embeddings.{theirs}_embeddings.weight", f"bert.{ours}_embedding.weight")
        for theirs, ours in (
            ("word", "token"),
            ("position", "position"),
            ("token_type", "segment"),
        )
    ]
    rules += linear(f"{prefix}embeddings.LayerNorm", "bert.embedding_norm")
    for i in range(config.n_layers):
        for theirs, ours in (
            ("attention.self.query", "attention.q_proj"),
            ("attention.self.key", "attention.k_proj"),
            ("attention.self.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("attention.output.LayerNorm", "attention_norm"),
            ("intermediate.dense", "ffn.up_proj"),
            ("output.dense", "ffn.down_proj"),
            ("output.LayerNorm", "ffn_norm"),
        ):
            rules += linear(f"{prefix}encoder.layer.{i}.{theirs}", f"bert.blocks.{i}.{ours}")
    return rules
