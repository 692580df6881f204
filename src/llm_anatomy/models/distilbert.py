"""DistilBERT (Sanh et al., 2019, arXiv:1910.01108): BERT with half of its layers.

It has no segments, no pooler that pre-training would train, and in training drops nothing of what
attention adds. Every other part is BERT's, so that its first weights can be cut out of BERT's:
`peft.distillation.initialise` does it, and the losses that it learns from a teacher with are in
`objectives`.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy.models.bert import (
    Bert,
    BertBlock,
    BertConfig,
    BertPretrained,
    MaskedLMHead,
    linear,
)
from llm_anatomy.models.checks import check_options, check_tokens
from llm_anatomy.weights import Rename, Rule

DISTILBERT_BASE = BertConfig(n_layers=6, n_segments=1, head_dropout=0.2)
"""One segment, whose vector is not added: the model has none."""


class DistilBertBlock(BertBlock):
    """BERT's block, but what attention adds is never dropped."""

    def forward(
        self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B 1 1 T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class DistilBert(Bert):
    """BERT's encoder without segments.

    Raises:
        ValueError: the config asks for segments, or for an epsilon other than the 1e-12 that
            DistilBERT's files do not store.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.n_segments != 1 or config.eps != 1e-12:
            raise ValueError(
                f"DistilBERT has 1 segment and an eps of 1e-12; "
                f"got {config.n_segments} and {config.eps}"
            )
        del self.segment_embedding
        self.blocks = nn.ModuleList(DistilBertBlock(config) for _ in range(config.n_layers))

    def embed(
        self, tokens: Int[Tensor, "B T"], segments: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The sum of two vectors a token, normalised: what it is, and where.

        Raises:
            ValueError: segments are given, there is no token, an id is out of range, or the text is
                longer than the context.
        """
        if segments is not None:
            raise ValueError("DistilBERT tells no segments apart; got some")
        check_tokens(tokens, self.config.vocab_size)
        x = self.token_embedding(tokens) + self.position_embedding(self.positions(tokens))
        return self.dropout(self.embedding_norm(x))


class DistilBertPretrained(BertPretrained):
    """What the checkpoints of DistilBERT have in common. Their words differ from BERT's."""

    model_type = "distilbert"
    encoder = DistilBert

    @staticmethod
    def config_from_hf(hf: Mapping[str, Any]) -> BertConfig:
        check_options(
            hf,
            {
                "activation": ("gelu",),
                "sinusoidal_pos_embds": (False, True),  # how the table was first filled
                "tie_word_embeddings": (True,),
            },
        )
        return BertConfig(
            vocab_size=hf["vocab_size"],
            n_layers=hf["n_layers"],
            n_heads=hf["n_heads"],
            d_model=hf["dim"],
            d_ff=hf["hidden_dim"],
            n_positions=hf["max_position_embeddings"],
            n_segments=1,
            n_labels=len(hf.get("id2label") or range(2)),
            attention_dropout=hf["attention_dropout"],
            dropout=hf["dropout"],
            head_dropout=hf["seq_classif_dropout"],
            pad_id=hf.get("pad_token_id", 0),
        )

    @classmethod
    def config_to_hf(cls, config: BertConfig) -> dict[str, Any]:
        labels = {str(i): f"LABEL_{i}" for i in range(config.n_labels)}
        return {
            "architectures": [cls.__name__],
            "vocab_size": config.vocab_size,
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "dim": config.d_model,
            "hidden_dim": config.d_ff,
            "max_position_embeddings": config.n_positions,
            "id2label": labels,
            "label2id": {label: int(i) for i, label in labels.items()},
            "activation": "gelu",
            "attention_dropout": config.attention_dropout,
            "dropout": config.dropout,
            "seq_classif_dropout": config.head_dropout,
            "pad_token_id": config.pad_id,
        }


class DistilBertForMaskedLM(DistilBertPretrained):
    """Masked tokens: the task that DistilBERT shares with its teacher."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.mlm = MaskedLMHead(config)
        self.initialise()

    def logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Scores of every token of the vocabulary, at every position."""
        return self.mlm(x, self.bert.token_embedding.weight)

    def forward(
        self, tokens: Int[Tensor, "B T"], keep: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T V"]:
        return self.logits(self.bert(tokens, keep=keep))

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [
            *encoder_rules(config),
            *linear("vocab_transform", "mlm.dense"),
            *linear("vocab_layer_norm", "mlm.norm"),
            Rename("vocab_projector.bias", "mlm.bias"),
        ]

    @staticmethod
    def hf_tied(config: BertConfig) -> dict[str, str]:
        return {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}


class DistilBertForSequenceClassification(DistilBertPretrained):
    """One of `n_labels` classes for a text; the layer before the classifier is new, with ReLU."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.d_model, config.n_labels)
        self.initialise()

    def forward(
        self, tokens: Int[Tensor, "B T"], keep: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B n_labels"]:
        first = self.bert(tokens, keep=keep)[:, 0]  # (B, D)
        return self.classifier(self.dropout(F.relu(self.dense(first))))

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [
            *encoder_rules(config),
            *linear("pre_classifier", "dense"),
            *linear("classifier", "classifier"),
        ]


def encoder_rules(config: BertConfig) -> list[Rule]:
    """The encoder, under DistilBERT's own names for BERT's layers."""
    rules: list[Rule] = [
        Rename(f"distilbert.embeddings.{theirs}_embeddings.weight", f"bert.{ours}_embedding.weight")
        for theirs, ours in (("word", "token"), ("position", "position"))
    ]
    rules += linear("distilbert.embeddings.LayerNorm", "bert.embedding_norm")
    for i in range(config.n_layers):
        for theirs, ours in (
            ("attention.q_lin", "attention.q_proj"),
            ("attention.k_lin", "attention.k_proj"),
            ("attention.v_lin", "attention.v_proj"),
            ("attention.out_lin", "attention.o_proj"),
            ("sa_layer_norm", "attention_norm"),
            ("ffn.lin1", "ffn.up_proj"),
            ("ffn.lin2", "ffn.down_proj"),
            ("output_layer_norm", "ffn_norm"),
        ):
            rules += linear(f"distilbert.transformer.layer.{i}.{theirs}", f"bert.blocks.{i}.{ours}")
    return rules
