"""RoBERTa (Liu et al., 2019, arXiv:1907.11692): BERT, trained longer, on more text, for one task.

There is no next sentence to predict and one segment only; the tokens are pieces of bytes. The
padding token stands at the position that has its own id for a number, and real tokens are numbered
from the next one on. Everything else is BERT's, under other names in the checkpoint.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm_anatomy.models.bert import (
    Bert,
    BertConfig,
    BertPretrained,
    MaskedLMHead,
    Pooler,
    encoder_rules,
    linear,
)
from llm_anatomy.models.checks import check_context
from llm_anatomy.weights import Rename, Rule

ROBERTA_BASE = BertConfig(vocab_size=50_265, n_positions=514, n_segments=1, eps=1e-5, pad_id=1)
ROBERTA_LARGE = BertConfig(
    vocab_size=50_265,
    n_layers=24,
    n_heads=16,
    d_model=1024,
    d_ff=4096,
    n_positions=514,
    n_segments=1,
    eps=1e-5,
    pad_id=1,
)
"""Both have 514 vectors for 512 positions: number 0 is never read, number 1 stands at padding."""


class Roberta(Bert):
    """BERT's encoder, with the positions of RoBERTa.

    Raises:
        ValueError: the config has no `pad_id` to number positions from.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.pad_id is None:
            raise ValueError("RoBERTa numbers positions from pad_id on, which must not be None")
        self.position_embedding.padding_idx = config.pad_id

    def positions(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """Number real tokens from `pad_id + 1` on; every padding token has the number `pad_id`."""
        pad_id = self.config.pad_id
        real = (tokens != pad_id).long()
        check_context(int(real.sum(dim=1).max()), self.config.n_positions - pad_id - 1)
        return pad_id + real.cumsum(dim=1) * real  # (B, T)


class RobertaForMaskedLM(BertPretrained):
    """Masked tokens, the one task of pre-training."""

    model_type = "roberta"
    # Files may hold a pooler, but with no next sentence to predict nothing has trained it.
    hf_ignored = (".position_ids", "roberta.pooler.dense.weight", "roberta.pooler.dense.bias")
    encoder = Roberta

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
            *encoder_rules("roberta.", config),
            *linear("lm_head.dense", "mlm.dense"),
            *linear("lm_head.layer_norm", "mlm.norm"),
            Rename("lm_head.bias", "mlm.bias"),
        ]

    @staticmethod
    def hf_tied(config: BertConfig) -> dict[str, str]:
        return {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        }


class RobertaForSequenceClassification(BertPretrained):
    """One of `n_labels` classes for a text; what pools is new and trained with the classifier."""

    model_type = "roberta"
    encoder = Roberta

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.d_model, config.n_labels)
        self.initialise()

    def forward(
        self, tokens: Int[Tensor, "B T"], keep: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B n_labels"]:
        first = self.bert(tokens, keep=keep)[:, :1]  # (B, 1, D)
        return self.classifier(self.dropout(self.pooler(self.dropout(first))))

    @staticmethod
    def hf_rules(config: BertConfig) -> list[Rule]:
        return [
            *encoder_rules("roberta.", config),
            *linear("classifier.dense", "pooler.dense"),
            *linear("classifier.out_proj", "classifier"),
        ]
