"""Checkpoints in and out: what fits is read to the last bit, what does not is refused whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llm_anatomy.models.transformer import Transformer, TransformerConfig
from llm_anatomy.weights import Fused, Pretrained, Rename, from_hf, read_weights, to_hf

CONFIG = TransformerConfig(
    vocab_size=19,
    n_encoder_layers=1,
    n_decoder_layers=2,
    n_heads=2,
    d_model=8,
    d_ff=12,
    n_positions=16,
    interleaved=False,
    pad_id=18,
)


@pytest.fixture
def model() -> Transformer:
    model = Transformer(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    """Pass the stored tensors through `change` and store what is left in the dictionary."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- Rules ----------------------------------------------------------------------------------------


def test_rename_changes_name_and_layout_and_back():
    """Three axes turned round: a transposition would be its own way back."""
    rule = Rename("a.weight", "b.weight", "h i o -> o h i")
    theirs = {"a.weight": torch.randn(2, 3, 5)}
    ours = from_hf(theirs, [rule])
    assert torch.equal(ours["b.weight"], theirs["a.weight"].permute(2, 0, 1))
    assert torch.equal(to_hf(ours, [rule])["a.weight"], theirs["a.weight"])


def test_fused_takes_queries_keys_and_values_apart_as_gpt2_lays_them():
    rule = Fused("c_attn", ("q", "k", "v"), "i (r o) -> r o i", "r o i -> (r o) i", (1, 1, 1))
    theirs = {"c_attn": torch.randn(4, 18)}
    ours = from_hf(theirs, [rule])
    for name, columns in zip("qkv", theirs["c_attn"].split(6, dim=1), strict=True):
        assert torch.equal(ours[name], columns.T)
    assert torch.equal(to_hf(ours, [rule])["c_attn"], theirs["c_attn"])


def test_fused_takes_groups_apart_as_falcon_lays_them():
    """Per group: its query heads, then one key head, then one value head."""
    G, n, E, D = 2, 3, 4, 5
    rule = Fused(
        "qkv",
        ("q", "k", "v"),
        "(g r e) d -> r g e d",
        "r g e d -> (g r e) d",
        (n, 1, 1),
        {"g": G, "e": E},
    )
    theirs = {"qkv": torch.randn(G * (n + 2) * E, D)}
    ours = from_hf(theirs, [rule])
    heads = theirs["qkv"].view(G, n + 2, E, D)
    assert torch.equal(ours["q"], heads[:, :n].reshape(-1, D))
    assert torch.equal(ours["k"], heads[:, n].reshape(-1, D))
    assert torch.equal(ours["v"], heads[:, n + 1].reshape(-1, D))
    assert torch.equal(to_hf(ours, [rule])["qkv"], theirs["qkv"])


def test_a_layout_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"a has shape \(2, 3, 4\), which does not fit"):
        from_hf({"a": torch.zeros(2, 3, 4)}, [Rename("a", "b", "i o -> o i")])


def test_missing_names_are_listed():
    rules = [Rename(name, name) for name in "abcdefgh"]
    with pytest.raises(ValueError, match=r"lacks b, c, d, e, f and 2 more"):
        from_hf({"a": torch.zeros(1)}, rules)


def test_left_over_names_are_listed():
    with pytest.raises(ValueError, match="no rule knows: x, z"):
        from_hf({n: torch.zeros(1) for n in ("z", "a", "x")}, [Rename("a", "b")])


def test_tied_names_may_repeat_or_be_absent_but_not_differ():
    rules, tied = [Rename("a", "b")], {"copy": "a"}
    a = torch.randn(3)
    for theirs in ({"a": a}, {"a": a, "copy": a.clone()}):
        assert torch.equal(from_hf(theirs, rules, tied=tied)["b"], a)
    with pytest.raises(
        ValueError, match="copy should repeat a, but the checkpoint's values differ"
    ):
        from_hf({"a": a, "copy": a + 1}, rules, tied=tied)


def test_ignored_endings_are_passed_over():
    theirs = {"a": torch.ones(2), "h.0.attn.masked_bias": torch.zeros(1)}
    assert set(from_hf(theirs, [Rename("a", "b")], ignored=("masked_bias",))) == {"b"}


# --- Folders --------------------------------------------------------------------------------------


def test_what_is_saved_is_read_to_the_last_bit(model, folder):
    again = Transformer.from_pretrained(folder)
    assert again.config == CONFIG
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_shards_are_read_like_one_file(model, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shard_of = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(shard_of.values()):
        save_file({n: tensors[n] for n in names if shard_of[n] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    again = Transformer.from_pretrained(folder)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())

    missing = next(iter(shard_of.values()))
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=missing):
        read_weights(folder)
    save_file({"unrelated": torch.zeros(1)}, folder / missing)
    with pytest.raises(ValueError, match="the shards lack tensors"):
        read_weights(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is not an index of shards"):
        read_weights(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "corrupt or truncated"),
        (lambda data: data[:-1], "corrupt or truncated"),
        (lambda data: b"", "corrupt or truncated"),
        (lambda data: b"\xff" * 8 + data[8:], "corrupt or truncated"),
        (lambda data: b"not a checkpoint at all", "corrupt or truncated"),
    ],
)
def test_a_damaged_file_is_refused(folder, damage, message):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(folder)


def test_a_tensor_too_few_and_one_too_many(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.decoder.layers.1.fc1.weight"))
    with pytest.raises(ValueError, match=r"lacks model\.decoder\.layers\.1\.fc1\.weight"):
        Transformer.from_pretrained(folder)
    rewrite(folder, lambda t: t.update({"model.decoder.layers.1.fc1.weight": torch.zeros(12, 8)}))
    rewrite(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"no rule knows: model\.extra"):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            {"model.decoder.layers.1.fc2.weight": torch.zeros(12, 8)},
            r"decoder\.1\.ffn\.down_proj\.weight has shape \(12, 8\), expected \(8, 12\)",
        ),
        (
            {"final_logits_bias": torch.zeros(19)},
            r"final_logits_bias has shape \(19,\), which does",
        ),
        ({"final_logits_bias": torch.zeros(2, 19)}, "final_logits_bias has shape"),
        (
            {"model.decoder.layers.1.fc2.weight": None},
            r"lacks model\.decoder\.layers\.1\.fc2\.weigh",
        ),
        ({"model.decoder.layers.2.fc2.weight": torch.zeros(8, 12)}, r"no rule knows: .*layers\.2"),
        ({"lm_head.weight": torch.ones(19, 8)}, "lm_head.weight should repeat"),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(model, damage, message):
    state = to_hf(model.state_dict(), Transformer.hf_rules(CONFIG))
    state = {name: torch.zeros_like(tensor) for name, tensor in state.items()} | damage
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_hf({name: tensor for name, tensor in state.items() if tensor is not None})
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, "not valid JSON"),
        ("[1]", ValueError, "None model; expected 'marian'"),
        ('{"model_type": "bert"}', ValueError, "a 'bert' model; expected 'marian'"),
        (None, FileNotFoundError, "does not exist"),
    ],
)
def test_a_config_of_something_else_is_refused(folder, text, error, message):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_attention_heads": 4}, "same n_heads"),
        ({"decoder_ffn_dim": 99}, "same d_ff"),
        ({"decoder_vocab_size": 20}, "share one vocabulary"),
        ({"activation_function": "tanh"}, "unknown activation 'tanh'"),
        ({"activation_function": ["relu"]}, r"activation must be of type str, got \['relu'\]"),
        ({"d_model": 10}, r"has shape \(19, 8\), expected \(19, 10\)"),
        ({"d_model": 9}, r"d_model \(9\) is odd"),
        ({"d_model": "8"}, "d_model must be of type int, got '8'"),
        ({"d_model": None}, "d_model must be of type int, got None"),
        ({"encoder_layers": -1}, "n_encoder_layers must not be negative, got -1"),
        ({"encoder_layers": 2}, r"lacks model\.encoder\.layers\.1"),
        ({"encoder_layers": 0}, r"no rule knows: model\.encoder\.layers\.0"),
        ({"dropout": "0.1"}, "dropout must be of type float, got '0.1'"),
        ({"scale_embedding": 1}, "scaled_embedding must be of type bool, got 1"),
        ({"pad_token_id": 19}, r"pad_id \(19\) must be below vocab_size \(19\)"),
        ({"max_position_embeddings": 16.0}, r"n_positions must be of type int, got 16\.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_config_that_the_model_cannot_be_is_refused(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(folder)


KEYS = (
    "vocab_size encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads "
    "d_model encoder_ffn_dim decoder_ffn_dim max_position_embeddings dropout activation_function "
    "scale_embedding pad_token_id"
)


@pytest.mark.parametrize("key", KEYS.split())
def test_a_config_that_lacks_a_key_says_which(folder, key):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        Transformer.from_pretrained(folder)


def test_an_abstract_model_says_what_it_lacks():
    for call in (Pretrained.config_from_hf, Pretrained.config_to_hf, Pretrained.hf_rules):
        with pytest.raises(NotImplementedError):
            call({})
