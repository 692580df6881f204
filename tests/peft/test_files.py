"""The file format of the peft library."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from llm_anatomy.models.bert import BertConfig, BertForSequenceClassification
from llm_anatomy.models.gpt2 import GPT2, GPT2Config
from llm_anatomy.models.t5 import T5, T5Config
from llm_anatomy.peft import files

SETTINGS = {"peft_type": "LORA", "r": 3}


def bert() -> BertForSequenceClassification:
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 6, "d_ff": 10, "n_positions": 9}
    return BertForSequenceClassification(BertConfig(vocab_size=11, **sizes))


def gpt2() -> GPT2:
    return GPT2(GPT2Config(vocab_size=11, n_layers=1, n_heads=2, d_model=6, d_ff=10, n_positions=9))


def test_what_is_written_is_read(tmp_path):
    tensors = {"base_model.model.x.lora_A.weight": torch.randn(5, 3).T}  # not contiguous
    files.write(tmp_path / "new" / "folder", SETTINGS, tensors)
    assert files.read_settings(tmp_path / "new" / "folder", "LORA") == SETTINGS
    read = files.read_tensors(tmp_path / "new" / "folder")
    assert read.keys() == tensors.keys()
    assert torch.equal(*read.values(), *tensors.values())
    with safe_open(tmp_path / "new" / "folder" / files.WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        files.read_settings(tmp_path, "LORA")
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        files.read_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 3}', '{"peft_type": "IA3"}'])
def test_a_config_of_another_method_is_refused(tmp_path, text):
    (tmp_path / files.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"is not valid JSON|expected 'LORA'"):
        files.read_settings(tmp_path, "LORA")


def test_half_a_file_is_refused(tmp_path):
    files.write(tmp_path, SETTINGS, {"x": torch.randn(40)})
    whole = (tmp_path / files.WEIGHTS).read_bytes()
    (tmp_path / files.WEIGHTS).write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        files.read_tensors(tmp_path)


def test_settings_that_cannot_be_followed_are_refused():
    unused = ("use_dora", "rank_pattern", "bias", "layers")
    off = {"use_dora": False, "rank_pattern": {}, "bias": "none", "layers": None, "r": 8}
    files.check_unused(off, unused)
    for name, value in (("use_dora", True), ("rank_pattern", {"q": 2}), ("bias", "all")):
        with pytest.raises(ValueError, match=f"sets {name}"):
            files.check_unused({**off, name: value}, unused)


def test_a_setting_that_must_be_there():
    assert files.need({"r": 3}, "r") == 3
    with pytest.raises(ValueError, match="lacks lora_alpha"):
        files.need({"r": 3, "lora_alpha": None}, "lora_alpha")


# --- The base that an adapter was made for --------------------------------------------------------


def test_another_base_of_the_same_shape_is_told_apart(tmp_path):
    base = {"q": torch.randn(6, 4), "v": torch.randn(4, 4)}
    files.write(tmp_path, SETTINGS, {"x": torch.ones(1)}, base)
    files.check_base(tmp_path, base)
    files.check_base(tmp_path, {name: tensor.bfloat16() for name, tensor in base.items()})
    with pytest.raises(ValueError, match="its v has other weights"):
        files.check_base(tmp_path, {**base, "v": base["v"] + 0.1})
    with pytest.raises(ValueError, match="its v has other weights"):
        files.check_base(tmp_path, {**base, "v": torch.randn(1, 2)})
    with pytest.raises(ValueError, match="a base with v, which this one lacks"):
        files.check_base(tmp_path, {"q": base["q"]})


def test_a_file_that_names_no_base_fits_any(tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.ones(1)}, tmp_path / files.WEIGHTS, metadata=metadata)
        files.check_base(tmp_path, {"q": torch.randn(6, 4)})


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "ours", "theirs"),
    [
        (bert, "bert.blocks.0.attention.q_proj", "bert.encoder.layer.0.attention.self.query"),
        (bert, "bert.blocks.0.ffn.down_proj", "bert.encoder.layer.0.output.dense"),
        (bert, "classifier", "classifier"),
        (gpt2, "blocks.0.ffn.up_proj", "transformer.h.0.mlp.c_fc"),
        (
            lambda: T5(T5Config(vocab_size=11, n_encoder_layers=1, n_decoder_layers=1, d_model=8)),
            "decoder.0.cross_attention.v_proj",
            "decoder.block.0.layer.1.EncDecAttention.v",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 3)), "0", "0"),
    ],
)
def test_names_go_both_ways(model, ours, theirs):
    assert files.their_name(model(), ours) == theirs
    assert files.our_name(model(), theirs) == ours


def test_a_part_of_a_fused_matrix_is_refused():
    message = "attention.q_proj.*as one module, transformer.h.0.attn.c_attn"
    with pytest.raises(ValueError, match=message):
        files.their_name(gpt2(), "blocks.0.attention.k_proj")
    with pytest.raises(ValueError, match=message):
        files.our_name(gpt2(), "transformer.h.0.attn.c_attn")


def test_a_name_without_counterpart_is_refused():
    with pytest.raises(ValueError, match=r"blocks\.0 has no counterpart"):
        files.their_name(gpt2(), "blocks.0")
    with pytest.raises(ValueError, match=r"for transformer.h.5.mlp.c_fc, which this gpt2 model"):
        files.our_name(gpt2(), "transformer.h.5.mlp.c_fc")


def test_layers_that_theirs_stores_the_other_way_round():
    layer = nn.Identity()
    assert files.any_in_out(gpt2(), {"token_embedding": layer, "blocks.0.ffn.up_proj": layer})
    assert not files.any_in_out(gpt2(), {"token_embedding": layer})
    assert not files.any_in_out(bert(), {"bert.blocks.0.ffn.up_proj": layer})


def test_tensors_are_told_apart_by_what_they_belong_to():
    def module_of(name):
        return name.removesuffix(".gain") if name.endswith(".gain") else None

    names = ("a.b.gain", "head.weight", "head.bias", "c.gain")
    tensors = {files.PREFIX + name: torch.ones(1) for name in names}
    assert files.split(tensors, module_of) == (["a.b", "c"], ["head"])
    with pytest.raises(ValueError, match="nothing of its method"):
        files.split({files.PREFIX + "head.bias": torch.ones(1)}, module_of)
    with pytest.raises(ValueError, match=r"the adapter holds a\.gain; expected names"):
        files.split({"a.gain": torch.ones(1)}, module_of)


def test_modules_are_found_by_their_whole_names():
    model = bert()
    assert files.modules(model, ["classifier"]) == {"classifier": model.classifier}
    with pytest.raises(ValueError, match="for dense, which the model lacks"):
        files.modules(model, ["dense"])


def test_modules_that_train_in_full():
    model = bert()
    modules, parameters = files.in_full(model, ("classifier", "pooler"))
    assert modules == ["bert.pooler.dense", "classifier"]
    assert parameters["base_model.model.classifier.bias"] is model.classifier.bias
    assert sorted(parameters) == [
        f"base_model.model.{module}.{kind}"
        for module in ("bert.pooler.dense", "classifier")
        for kind in ("bias", "weight")
    ]
    assert files.in_full(model, ()) == ([], {})


def test_the_config_is_plain_json(tmp_path):
    files.write(tmp_path, {**SETTINGS, "targets": ("q",)}, {"x": torch.ones(1)})
    assert json.loads((tmp_path / files.CONFIG).read_text())["targets"] == ["q"]
