"""LoRA against the peft library, and what must hold without it."""

import copy
import json
import math
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from llm_anatomy.models.llama import Llama, LlamaConfig
from llm_anatomy.models.mixtral import Mixtral, MixtralConfig
from llm_anatomy.models.qwen import Qwen3
from llm_anatomy.peft import lora, targets
from llm_anatomy.peft.lora import LoRAConfig, LoRAEmbedding, LoRALinear
from llm_anatomy.peft.quantised import QuantisedConfig, QuantisedLinear, quantise_base
from tests import parity
from tests.peft import twins

R = 3
# Targets in transformers' names, and the same ones in ours where each is a module on both sides.
CHOICES = {
    "gpt2": [("c_attn",), ("attn.c_proj", "mlp.c_proj"), ("c_fc", "wte", "wpe")],
    "bert": [("query", "value"), ("output.dense", "pooler.dense"), ("key", "word_embeddings")],
    "t5": [("q", "v"), ("wi", "wo"), ("EncDecAttention.k", "o")],
}
OUR_CHOICES = {
    "gpt2": [(("attn.c_proj", "c_fc"), ("o_proj", "up_proj"))],
    "bert": [
        (("query", "value"), ("q_proj", "v_proj")),
        (("output.dense", "word_embeddings"), ("o_proj", "down_proj", "token_embedding")),
    ],
    "t5": [(("q", "v"), ("q_proj", "v_proj")), (("wi", "wo"), ("up_proj", "down_proj"))],
}
kinds = st.sampled_from(sorted(twins.THEIRS))


@st.composite
def cases(draw):
    kind = draw(kinds)
    fields = {
        "r": draw(st.sampled_from([1, R, 4])),
        "alpha": draw(st.sampled_from([1.0, 7.5, 16.0])),
        "targets": draw(st.sampled_from(CHOICES[kind])),
        "rank_stabilised": draw(st.booleans()),
    }
    return kind, fields, draw(parity.dtypes)


def theirs_of(config: LoRAConfig, **more) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilised,
        target_modules=list(config.targets),
        **more,
    )


def peft_names(name: str, layer: nn.Module) -> dict[str, str]:
    """Names of the factors under peft, for those of ours."""
    kind = (
        "lora_embedding_{}.default"
        if isinstance(layer, LoRAEmbedding)
        else "lora_{}.default.weight"
    )
    return {f"lora_{f}": f"base_model.model.{name}.{kind.format(f)}" for f in "AB"}


def pair(kind, config: LoRAConfig, dtype=torch.float32):
    """Two copies of one model of transformers, one under peft and one under ours, equal factors."""
    base = twins.theirs(kind, dtype)
    want = twins.with_peft(base, theirs_of(config))
    got = base
    lora.add(got, config)
    twins.draw(got)
    parameters = dict(want.named_parameters())
    with torch.no_grad():
        for name, layer in lora.layers.wrapped(got).items():
            for mine, name_there in peft_names(name, layer).items():
                parameters[name_there].copy_(getattr(layer, mine))
    return got, want


# --- Parity on models of transformers -------------------------------------------------------------


@parity.examples(14)
@given(cases())
def test_outputs_and_gradients_are_peft_s(case):
    kind, fields, dtype = case
    got, want = pair(kind, LoRAConfig(**fields), dtype)
    tolerance = parity.TOLERANCE[dtype]
    torch.testing.assert_close(twins.run(got, kind), twins.run(want, kind), **tolerance)
    ours, theirs = twins.gradients(got, kind), twins.gradients(want, kind)
    assert len(ours) == len(theirs)
    for name, layer in lora.layers.wrapped(got).items():
        for mine, name_there in peft_names(name, layer).items():
            torch.testing.assert_close(ours[f"{name}.{mine}"], theirs[name_there], **tolerance)
    assert sum(targets.trainable(got).values()) == want.get_nb_trainable_parameters()[0]


@parity.examples(8)
@given(cases())
def test_merged_weights_are_peft_s(case):
    kind, fields, dtype = case
    if "wte" in fields["targets"]:  # tied to the output; see the test of that
        return
    got, want = pair(kind, LoRAConfig(**fields), dtype)
    lora.merge_and_remove(got)
    plain = want.merge_and_unload().state_dict()
    assert got.state_dict().keys() == plain.keys()
    for name, tensor in got.state_dict().items():
        torch.testing.assert_close(tensor, plain[name], **parity.TOLERANCE[dtype])


@pytest.mark.parametrize("kind", sorted(twins.THEIRS))
def test_drops_what_peft_drops(kind):
    config = LoRAConfig(r=R, dropout=0.4, targets=CHOICES[kind][0])
    got, want = (model.train() for model in pair(kind, config))
    outputs = []
    for model in (got, want):
        torch.manual_seed(1)
        outputs.append(twins.run(model, kind))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], twins.run(got.eval(), kind))


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"), [(kind, names) for kind in sorted(CHOICES) for names in CHOICES[kind]]
)
def test_peft_reads_what_we_write_and_we_what_peft_writes(kind, names, tmp_path):
    base = twins.theirs(kind)
    model = twins.theirs(kind)
    config = LoRAConfig(r=R, alpha=7.0, dropout=0.25, targets=names, rank_stabilised=kind == "t5")
    lora.add(model, config)
    twins.draw(model)
    want = twins.run(model, kind)

    lora.save(model, tmp_path / "ours")
    theirs = twins.loaded_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(twins.run(theirs, kind), want)
    read = theirs.peft_config["default"]
    assert (read.r, read.lora_alpha, read.lora_dropout) == (R, 7, 0.25)

    theirs.save_pretrained(tmp_path / "theirs")
    again = twins.theirs(kind)
    back = lora.load(again, tmp_path / "theirs")
    assert torch.equal(twins.run(again.eval(), kind), want)
    assert (back.r, back.alpha, back.dropout) == (R, 7.0, 0.25)
    assert targets.trainable(again) == targets.trainable(model)


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [(kind, *names) for kind in sorted(OUR_CHOICES) for names in OUR_CHOICES[kind]],
)
def test_files_carry_an_adapter_between_our_model_and_theirs(kind, theirs, ours, tmp_path):
    """Under peft, on the class of transformers, and under ours, on our class: the same outputs."""
    mine = twins.ours(kind)
    lora.add(mine, LoRAConfig(r=R, alpha=7.0, targets=ours))
    twins.draw(mine)
    lora.save(mine, tmp_path / "ours")
    under_peft = twins.loaded_by_peft(twins.theirs(kind), tmp_path / "ours")
    torch.testing.assert_close(twins.run(under_peft, kind), twins.run(mine, kind))

    config = theirs_of(LoRAConfig(r=R, alpha=7.0, targets=theirs))
    other = twins.with_peft(twins.theirs(kind), config)
    twins.draw(other, seed=2)
    other.save_pretrained(tmp_path / "theirs")
    loaded = twins.ours(kind)
    lora.load(loaded, tmp_path / "theirs")
    torch.testing.assert_close(twins.run(loaded, kind), twins.run(other, kind))


def test_a_head_that_trains_in_full_goes_along(tmp_path):
    names = {"targets": ("query",), "also_train": ("classifier", "pooler.dense")}
    model = twins.theirs("bert")
    lora.add(model, LoRAConfig(r=R, **names))
    twins.draw(model)
    lora.save(model, tmp_path / "ours")
    theirs = twins.loaded_by_peft(twins.theirs("bert"), tmp_path / "ours")
    torch.testing.assert_close(twins.run(theirs, "bert"), twins.run(model, "bert"))
    theirs.save_pretrained(tmp_path / "theirs")
    mine = twins.ours("bert")
    lora.load(mine, tmp_path / "theirs")
    torch.testing.assert_close(twins.run(mine, "bert"), twins.run(model, "bert"))
    assert "classifier.bias" in targets.trainable(mine)
    lora.remove(mine)
    assert twins.same(twins.picture(mine), twins.picture(twins.ours("bert")))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_the_copy_of_a_table_that_peft_writes_is_the_base_s(target, tmp_path):
    """Beside the factors of an embedding or an output layer, peft writes what they change."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=twins.V, num_attention_heads=3, **sizes)
    base = parity.randomise(transformers.LlamaForCausalLM(config))
    want = twins.with_peft(base, theirs_of(LoRAConfig(r=R, targets=(target,))))
    twins.draw(want)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        want.save_pretrained(tmp_path)
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    tokens = twins.tokens("gpt2")[0]
    for model in (parity.twin(base, Llama), copy.deepcopy(base)):
        lora.load(model, tmp_path)
        logits = model(tokens)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        torch.testing.assert_close(logits, want(input_ids=tokens).logits)
    other = parity.randomise(transformers.LlamaForCausalLM(config), seed=9)
    message = twins.refused(other, lambda model: lora.load(model, tmp_path))
    assert "brings another" in message
    assert f"{target}.weight than that of the base" in message


def test_a_part_of_a_fused_matrix_cannot_be_written(tmp_path):
    model = twins.ours("gpt2")
    lora.add(model, LoRAConfig(r=R))
    with pytest.raises(ValueError, match="as one module, transformer.h.0.attn.c_attn"):  # noqa: RUF043
        lora.save(model, tmp_path)
    other = twins.theirs("gpt2")
    lora.add(other, LoRAConfig(r=R, targets=("c_attn",)))
    lora.save(other, tmp_path)
    message = twins.refused(twins.ours("gpt2"), lambda model: lora.load(model, tmp_path))
    assert "as one module, transformer.h.0.attn.c_attn" in message


def test_a_tied_embedding_cannot_be_written(tmp_path):
    model = twins.ours("gpt2")
    lora.add(model, LoRAConfig(r=R, targets=("token_embedding",)))
    with pytest.raises(ValueError, match="token_embedding is tied to the output"):
        lora.save(model, tmp_path)


def saved(tmp_path, kind="bert", names=("query",)):
    model = twins.theirs(kind)
    lora.add(model, LoRAConfig(r=R, targets=names))
    twins.draw(model)
    lora.save(model, tmp_path)
    return tmp_path


def test_an_adapter_for_another_base_is_refused(tmp_path):
    """Another architecture, other sizes, or the same sizes with other weights."""
    folder = saved(tmp_path)
    load = lambda model: lora.load(model, folder)  # noqa: E731
    assert "which this t5 model lacks" in twins.refused(twins.ours("t5"), load)
    assert "query, which the model lacks" in twins.refused(twins.theirs("gpt2"), load)
    assert "has other weights" in twins.refused(twins.theirs("bert", seed=9), load)
    assert "has other weights" in twins.refused(parity.randomise(twins.ours("bert"), seed=9), load)
    small = twins.theirs("bert")
    for layer in small.bert.encoder.layer:
        layer.attention.self.query = nn.Linear(10, 8)
    assert "expected (3, 10)" in twins.refused(small, load)
    lora.load(twins.theirs("bert", torch.bfloat16), folder)  # the same base in lower precision


def test_the_base_is_known_merged_or_not_and_in_either_layout(tmp_path):
    """GPT-2's square matrices lie the other way round in transformers."""
    model = twins.ours("gpt2")
    lora.add(model, LoRAConfig(r=R, targets=("o_proj",)))
    twins.draw(model)
    want = twins.run(model, "gpt2")
    lora.merge(model)
    lora.save(model, tmp_path)
    for base in (twins.ours("gpt2"), twins.theirs("gpt2")):
        lora.load(base, tmp_path)
        torch.testing.assert_close(twins.run(base, "gpt2"), want)
    other = twins.theirs("gpt2", seed=9)
    assert "has other weights" in twins.refused(other, lambda model: lora.load(model, tmp_path))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("use_dora", True, "sets use_dora"),
        ("rank_pattern", {"query": 2}, "sets rank_pattern"),
        ("bias", "all", "sets bias"),
        ("r", None, "lacks r"),
        ("r", 2, r"has shape (3, 12), expected (2, 12)"),
        ("lora_alpha", 0, "alpha must be"),
        ("lora_alpha", [1], "sets lora_alpha to [1], which is no number"),
        ("lora_dropout", "some", "sets lora_dropout to 'some', which is no number"),
        ("peft_type", "IA3", "expected 'LORA'"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(setting, value, message, tmp_path):
    path = saved(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    assert message in twins.refused(twins.theirs("bert"), lambda model: lora.load(model, tmp_path))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_file_whose_base_was_changed_is_refused(start, tmp_path):
    """These begin with a part of the weight in the factors, and take it out of the base."""
    base = twins.theirs("bert")
    config = theirs_of(LoRAConfig(r=R, targets=("query",)), init_lora_weights=start)
    twins.with_peft(base, config).save_pretrained(tmp_path)
    message = twins.refused(base, lambda model: lora.load(model, tmp_path))
    assert f"init_lora_weights is '{start}'" in message
    kept = theirs_of(LoRAConfig(r=R, targets=("query",)), init_lora_weights="gaussian")
    twins.with_peft(base, kept).save_pretrained(tmp_path)
    lora.load(base, tmp_path)


@pytest.mark.parametrize(
    ("make", "target", "tied"),
    [
        (twins.ours, "up_proj", ("token_embedding",)),
        (twins.theirs, "c_fc", ("lm_head",)),
        (twins.theirs, "c_fc", ("wte", "lm_head")),
    ],
)
def test_a_tied_table_that_trains_in_full_cannot_be_written(make, target, tied, tmp_path):
    """peft would train a copy in one place, and leave the other as it was."""
    model = make("gpt2")
    lora.add(model, LoRAConfig(r=R, targets=(target,), also_train=tied))
    message = twins.refused(model, lambda model: lora.save(model, tmp_path / "new"))
    assert "is tied to another module" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(sorted(t)[0]), "lacks"),
        (lambda t: t.update(other=torch.ones(1)), "the adapter holds other"),
        (lambda t: t.clear() or t.update({"base_model.model.x.w": torch.ones(1)}), "nothing of"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    path = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert message in twins.refused(twins.theirs("bert"), lambda model: lora.load(model, tmp_path))


# --- What must hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(twins.THEIRS))
def test_starts_at_the_base_and_learns(kind):
    """One factor starts at zero, the other does not: with both at zero, neither would ever move."""
    model = twins.theirs(kind)
    want = twins.run(model, kind)
    lora.add(model, LoRAConfig(r=R, targets=CHOICES[kind][-1]))
    torch.testing.assert_close(twins.run(model, kind), want)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = targets.state(model)
    for _ in range(2):  # the first step moves the factor that is zero, the second both
        twins.gradients(model, kind)
        optimizer.step()
    for name, tensor in targets.state(model).items():
        assert not torch.equal(tensor, before[name]), name


def test_first_factors_are_drawn_as_the_authors_code_does():
    torch.manual_seed(0)
    d_in, bound = 256, 1 / math.sqrt(256)
    a = LoRALinear(nn.Linear(d_in, 64), LoRAConfig(r=64)).lora_A
    assert a.abs().max() <= bound
    torch.testing.assert_close(a.std().item(), bound / math.sqrt(3), rtol=0.02, atol=0.0)
    embedding = LoRAEmbedding(nn.Embedding(64, 64), LoRAConfig(r=64))
    assert not embedding.lora_A.any()
    torch.testing.assert_close(embedding.lora_B.std().item(), 1.0, rtol=0.05, atol=0.0)


def test_padding_learns_nothing():
    """As in the table of the base: the column of A that belongs to padding has no gradient."""
    layer = LoRAEmbedding(nn.Embedding(9, 6, padding_idx=2), LoRAConfig(r=R))
    layer(torch.tensor([[2, 4, 2]])).square().sum().backward()
    assert layer.lora_A.grad[:, 4].any()
    assert not layer.lora_A.grad[:, 2].any()


@pytest.mark.parametrize("kind", sorted(twins.OURS))
def test_merged_it_computes_the_same_and_unmerged_it_is_the_base(kind):
    model = twins.ours(kind, torch.float64)
    before = twins.picture(model)
    names = ("q_proj", "down_proj", "token_embedding")  # GPT-2 and T5 tie their outputs to this
    lora.add(model, LoRAConfig(r=R, alpha=7.0, targets=names))
    twins.draw(model)
    inside, want = twins.picture(model), twins.run(model, kind)
    lora.merge(model)
    assert targets.trainable(model) == {}
    torch.testing.assert_close(twins.run(model, kind), want, **parity.TOLERANCE[torch.float64])
    lora.unmerge(model)
    assert twins.same(twins.picture(model), inside)
    assert torch.equal(twins.run(model, kind), want)
    lora.merge(model)
    lora.remove(model)  # whether merged or not
    assert twins.same(twins.picture(model), before)


def test_a_merge_that_stays_leaves_a_plain_model():
    model = twins.ours("bert")
    before = twins.picture(model)
    lora.add(model, LoRAConfig(r=R, also_train=("classifier",)))
    twins.draw(model)
    want = twins.run(model, "bert")
    lora.merge_and_remove(model)
    torch.testing.assert_close(twins.run(model, "bert"), want)
    after = twins.picture(model)
    assert after[1:] == before[1:]
    changed = {
        name for name, tensor in after[0].items() if not torch.equal(tensor, before[0][name])
    }
    assert changed == {
        *(f"bert.blocks.{i}.attention.{n}_proj.weight" for i in range(2) for n in "qv"),
        *("classifier.weight", "classifier.bias"),
    }


def test_the_rank_of_an_update_is_at_most_r():
    layer = LoRALinear(nn.Linear(9, 7), LoRAConfig(r=R))
    twins.draw(layer)
    assert torch.linalg.matrix_rank(layer.update()) == R


def test_adapters_of_several_tasks_take_turns_on_one_base():
    model = twins.ours("bert")
    base = twins.run(model, "bert")
    outputs, states = {}, {}
    for task in ("french", "dutch"):
        lora.add(model, LoRAConfig(r=R, also_train=("classifier",)))
        twins.draw(model, seed=len(task))
        outputs[task], states[task] = twins.run(model, "bert"), targets.state(model)
        lora.remove(model)
        assert torch.equal(twins.run(model, "bert"), base)
    lora.add(model, LoRAConfig(r=R, also_train=("classifier",)))
    for task in ("french", "dutch", "french"):
        targets.load_state(model, states[task])
        assert torch.equal(twins.run(model, "bert"), outputs[task])


def test_on_a_base_in_four_bits():
    """QLoRA: gradients pass through the frozen layers, and only a merge is not possible."""
    model = twins.ours("bert")
    quantise_base(model, QuantisedConfig(targets=("q_proj", "v_proj")))
    want = twins.run(model, "bert")
    lora.add(model, LoRAConfig(r=R))
    assert torch.equal(twins.run(model, "bert"), want)
    twins.draw(model)
    assert all(g.any() for g in twins.gradients(model, "bert").values())
    message = twins.refused(model, lora.merge)
    assert "has no weight of real numbers" in message
    lora.remove(model)
    assert isinstance(model.bert.blocks[0].attention.q_proj, QuantisedLinear)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(targets=("query",)), "no module is called query"),
        (LoRAConfig(targets=("q_proj", "ffn_norm")), "ffn_norm is a LayerNorm"),
        (LoRAConfig(r=13), "rank 13 is above the width of"),
        (LoRAConfig(r=13, targets=("down_proj",)), "which maps 20 to 12"),
        (LoRAConfig(also_train=("head",)), "no module is called head"),
        (LoRAConfig(also_train=("attention",)), "cannot be a target and train in full"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    assert message in twins.refused(twins.ours("bert"), lambda model: lora.add(model, config))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"r": 2.0},
        {"alpha": -1.0},
        {"dropout": 1.0},
        {"targets": "q_proj"},
        {"targets": ()},
        {"also_train": "classifier"},
    ],
)
def test_fields_out_of_range_are_refused(fields, unchecked):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must"):
        LoRAConfig(**fields)


def test_nothing_is_done_twice_or_undone_before_it_is_done(tmp_path):
    model = twins.ours("bert")
    assert "does not carry LoRA, but nothing" in twins.refused(model, lora.merge)
    assert "does not carry LoRA, but nothing" in twins.refused(model, lora.remove)
    folder = saved(tmp_path)
    lora.add(model, LoRAConfig(r=R))
    assert "carries LoRA already" in twins.refused(model, lambda m: lora.add(m, LoRAConfig(r=R)))
    assert "carries LoRA already" in twins.refused(model, lambda m: lora.load(m, folder))
    assert "LoRA is not merged" in twins.refused(model, lora.unmerge)
    lora.merge(model)
    assert "LoRA is merged already" in twins.refused(model, lora.merge)
    assert "carries LoRA already" in twins.refused(model, lambda m: lora.add(m, LoRAConfig(r=R)))
    lora.remove(model)
    assert "does not carry LoRA, but nothing" in twins.refused(model, lora.remove)


def test_a_shared_weight_is_not_merged():
    """transformers' GPT-2 holds one table in two modules; peft would change the output as well."""
    model = twins.theirs("gpt2")
    lora.add(model, LoRAConfig(r=R, targets=("wte",)))
    assert "shares its weight with lm_head" in twins.refused(model, lora.merge)


def test_a_module_under_two_names_is_not_loaded_either(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lora.add(model, LoRAConfig(r=R, targets=("a",)))
    lora.save(model, tmp_path)
    lora.remove(model)
    model["b"] = model["a"]
    message = twins.refused(model, lambda model: lora.load(model, tmp_path))
    assert "a and b are one module" in message


def test_layers_that_pytorch_does_not_call_are_refused():
    """In evaluation it reads their weights, and would pass over what was put around them."""
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    for name, parent in (
        ("linear1", "TransformerEncoderLayer"),
        ("out_proj", "MultiheadAttention"),
    ):
        config = LoRAConfig(r=2, targets=(name,))
        message = twins.refused(model, lambda model, config=config: lora.add(model, config))
        assert f"{name} cannot be adapted: PyTorch's {parent} reads" in message


def test_a_table_of_scaled_vectors():
    """As BART and Gemma 3 have it: what is learned is scaled as well, so that it can be merged."""
    base = BartScaledWordEmbedding(9, 6, padding_idx=0, embed_scale=2.5)
    want = peft.inject_adapter_in_model(
        peft.LoraConfig(r=R, lora_alpha=8.0, target_modules=["table"]),
        nn.ModuleDict({"table": copy.deepcopy(base)}),
    )["table"]
    model = nn.ModuleDict({"table": base})
    lora.add(model, LoRAConfig(r=R, targets=("table",)))
    twins.draw(model)
    with torch.no_grad():
        want.lora_embedding_A["default"].copy_(model["table"].lora_A)
        want.lora_embedding_B["default"].copy_(model["table"].lora_B)
    tokens = torch.tensor([[3, 1, 8]])
    got = model["table"](tokens)
    torch.testing.assert_close(got, want(tokens))
    lora.merge(model)
    torch.testing.assert_close(model["table"](tokens), got)


def test_a_table_that_does_more_than_look_up_is_refused():
    class Normed(nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens).tanh()

    model = nn.ModuleDict({"table": Normed(9, 6)})
    config = LoRAConfig(r=R, targets=("table",))
    message = twins.refused(model, lambda model: lora.add(model, config))
    assert "table is a Normed, which does more than look up" in message


def test_a_layer_without_a_weight_is_refused():
    class Packed(nn.Module):  # as PyTorch's dynamically quantised layers
        in_features = out_features = 4

        def weight(self):
            return torch.ones(4, 4)

    model = nn.ModuleDict({"a": Packed()})
    message = twins.refused(model, lambda m: lora.add(m, LoRAConfig(r=2, targets=("a",))))
    assert "Packed holds no weight" in message


def test_a_merge_of_a_part_is_seen_by_the_whole():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4))})
    lora.add(model["body"], LoRAConfig(r=2, targets=("0",)))
    lora.merge(model["body"])
    assert targets.is_merged(model)
    with pytest.raises(ValueError, match="LoRA is merged"):
        targets.state(model)
    assert "does not carry LoRA" in twins.refused(model, lora.merge_and_remove)


@pytest.mark.parametrize("base", [nn.Linear(4, 6), nn.Linear(4, 6, bias=False)])
def test_a_layer_still_says_how_wide_it_is(base):
    layer = LoRALinear(base, LoRAConfig(r=2))
    assert (layer.in_features, layer.out_features) == (4, 6)
    assert not hasattr(LoRAEmbedding(nn.Embedding(4, 6), LoRAConfig(r=2)), "in_features")


class WithStatistics(nn.Module):
    """A head and a body that each keep running statistics, which are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.body(x))


def test_running_statistics_come_back_and_those_of_a_head_go_along(tmp_path):
    torch.manual_seed(0)
    model, x = WithStatistics(), torch.randn(9, 4)
    before, base = twins.picture(model), copy.deepcopy(model)
    lora.add(model, LoRAConfig(r=2, targets=("body.0",), also_train=("head",)))
    twins.draw(model)
    model.head[0](x)  # in training
    model.eval()
    want = model(x)
    lora.save(model, tmp_path / "ours")
    theirs = twins.loaded_by_peft(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(x), want)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base).eval()
    lora.load(again, tmp_path / "theirs")
    torch.testing.assert_close(again(x), want)
    model.train()(x)
    lora.remove(model)
    assert twins.same(twins.picture(model), before)


SMALL = {"vocab_size": 9, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_model": 8, "d_ff": 6}


def test_a_refusal_says_which_layer_is_meant():
    """Qwen 3 has a norm after the projection, inside the module of that name."""
    message = twins.refused(
        Qwen3(LlamaConfig(**SMALL, d_head=4)), lambda model: lora.add(model, LoRAConfig(r=2))
    )
    assert "such as blocks.0.attention.q_proj.linear" in message


def test_one_expert_of_many_cannot_be_written(tmp_path):
    """transformers holds the matrices of all experts in one tensor."""
    model = Mixtral(MixtralConfig(**SMALL))
    lora.add(model, LoRAConfig(r=2, targets=("up_proj",)))
    message = twins.refused(model, lambda model: lora.save(model, tmp_path / "new"))
    assert "all other experts in one tensor" in message
    assert not (tmp_path / "new").exists()
