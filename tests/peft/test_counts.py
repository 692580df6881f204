"""The formulas of counts.py against models of full size, which take no memory, and against peft."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from llm_anatomy.models.bert import BERT_LARGE, BertModel
from llm_anatomy.models.gpt2 import GPT2, GPT2Config
from llm_anatomy.models.t5 import T5, T5_SMALL
from llm_anatomy.peft import adapter, bitfit, counts
from llm_anatomy.peft.counts import SHAPES, Shape
from llm_anatomy.peft.targets import trainable

# Models as transformers builds them, by the name of their shape. T5 scores with its embedding.
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
T5_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
CONFIGS = {
    "BERT-base": lambda: transformers.BertConfig(),
    "BERT-large": lambda: transformers.BertConfig(**LARGE, intermediate_size=4096),
    **{
        name: lambda L=L, D=D, H=H, n=n: transformers.GPT2Config(
            n_layer=L, n_embd=D, n_head=H, n_positions=n
        )
        for name, L, D, H, n in (
            ("GPT-2 small", 12, 768, 12, 1024),
            ("GPT-2 medium", 24, 1024, 16, 1024),
            ("GPT-2 large", 36, 1280, 20, 1024),
            ("GPT-2 XL", 48, 1600, 25, 1024),
            ("GPT-3", 96, 12_288, 96, 2048),
        )
    },
    **{
        name: lambda sizes=sizes: transformers.T5Config(**dict(zip(T5_SIZES, sizes, strict=True)))
        for name, *sizes in (
            ("T5-small", 32_128, 512, 64, 2048, 6, 8),
            ("T5-base", 32_128, 768, 64, 3072, 12, 12),
            ("T5-large", 32_128, 1024, 64, 4096, 24, 16),
            ("T5-3B", 32_128, 1024, 128, 16_384, 24, 32),
            ("T5-11B", 32_128, 1024, 128, 65_536, 24, 128),
        )
    },
    "LLaMA-7B": lambda: transformers.LlamaConfig(),
}
CLASSES = {
    "BERT": transformers.BertModel,
    "GPT": transformers.GPT2LMHeadModel,
    "T5": transformers.T5ForConditionalGeneration,
    "LLaMA": transformers.LlamaForCausalLM,
}
# What one family calls the maps that the counts call q_proj, k_proj, v_proj, …
NAMES = {
    "BERT": (
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "T5": ("q", "k", "v", "o", "wi", "wo"),
    "LLaMA": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"),
}
OURS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
TASKS = {
    "BERT": "FEATURE_EXTRACTION",
    "T5": "SEQ_2_SEQ_LM",
    "GPT": "CAUSAL_LM",
    "LLaMA": "CAUSAL_LM",
}


def family(name: str) -> str:
    return name.partition("-")[0]


@pytest.fixture(scope="module")
def built():
    """Each model once, on the meta device; the last one is kept, for a test may change a copy."""
    models: dict[str, nn.Module] = {}

    def build(name: str) -> nn.Module:
        if name not in models:
            with torch.device("meta"):
                models[name] = CLASSES[family(name)](CONFIGS[name]())
        return models[name]

    return build


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def trained(model: nn.Module, config: peft.PeftConfig) -> int:
    """Parameters that train once peft has put a method on a copy of the model."""
    with torch.device("meta"):
        model = peft.get_peft_model(copy.deepcopy(model), config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", SHAPES)
def test_full_counts_every_parameter_and_bitfit_every_bias(name, built):
    model = built(name)
    assert counts.full(SHAPES[name]) == size(model)
    biases = [p.numel() for key, p in model.named_parameters() if key.endswith(".bias")]
    assert counts.bitfit(SHAPES[name]) == sum(biases)


@pytest.mark.parametrize("name", ["BERT-base", "BERT-large", "T5-small", "T5-3B", "LLaMA-7B"])
def test_lora_counts_what_peft_trains(name, built):
    shape, names = SHAPES[name], NAMES[family(name)]
    for r, some in ((1, slice(0, 1)), (8, slice(0, 3, 2)), (4, slice(0, 4)), (3, slice(None))):
        theirs = list(names[some])
        if family(name) == "BERT" and some == slice(0, 3, 2):
            theirs = ["query", "value"]
        config = peft.LoraConfig(r=r, target_modules=theirs)
        ours = OURS[: len(names)][some]
        assert counts.lora(shape, r, ours) == trained(built(name), config), ours
    every = counts.every_matrix(shape)
    assert set(every) == set(OURS[: len(names)])


@pytest.mark.parametrize("name", ["GPT-2 small", "GPT-2 XL"])
def test_lora_counts_the_fused_matrix_of_gpt2(name, built):
    """Two factors for three maps in one are fewer than for the three apart."""
    shape = SHAPES[name]
    config = peft.LoraConfig(r=8, task_type="CAUSAL_LM", fan_in_fan_out=True)  # c_attn by default
    assert counts.lora(shape, 8, ["qkv_proj"]) == trained(built(name), config)
    assert counts.lora(shape, 8, ["qkv_proj"]) < counts.lora(
        shape, 8, ["q_proj", "k_proj", "v_proj"]
    )
    config = peft.LoraConfig(r=2, target_modules=["c_proj", "c_fc"], fan_in_fan_out=True)
    every = ["o_proj", "down_proj", "up_proj"]
    assert counts.lora(shape, 2, every) == trained(built(name), config)


IA3 = {
    "BERT": (r".*(key|value|layer\.\d+\.output\.dense)", r".*layer\.\d+\.output\.dense"),
    "T5": (r".*\.(k|v|wo)", r".*\.wo"),
    "LLaMA": (r".*\.(k_proj|v_proj|down_proj)", r".*\.down_proj"),
}


@pytest.mark.parametrize("name", ["BERT-base", "T5-small", "T5-3B", "LLaMA-7B"])
def test_ia3_counts_what_peft_trains(name, built):
    targets, inner = IA3[family(name)]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inner)
    assert counts.ia3(SHAPES[name]) == trained(built(name), config)


@pytest.mark.parametrize("name", ["BERT-base", "BERT-large", "GPT-2 XL", "T5-large", "LLaMA-7B"])
def test_prompts_and_prefixes_count_what_peft_trains(name, built):
    shape, model = SHAPES[name], built(name)
    task = {"task_type": TASKS[family(name)]}
    P = 7
    # Of an encoder-decoder peft would prompt both; the paper, and we, prompt the encoder.
    config = peft.PromptTuningConfig(num_virtual_tokens=P, num_transformer_submodules=1, **task)
    assert counts.prompt(shape, P) == trained(model, config)
    config = peft.PrefixTuningConfig(num_virtual_tokens=P, **task)
    assert counts.prefix(shape, P) == trained(model, config)
    for hidden in (None, 50):
        config = peft.PrefixTuningConfig(
            num_virtual_tokens=P,
            prefix_projection=True,
            encoder_hidden_size=hidden or shape.d_model,
            **task,
        )
        assert counts.prefix_reparametrised(shape, P, hidden) == trained(model, config)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("BERT-large", lambda: BertModel(BERT_LARGE)),
        ("GPT-2 small", lambda: GPT2(GPT2Config())),
        ("T5-small", lambda: T5(T5_SMALL)),
    ],
)
def test_adapters_and_biases_count_what_our_methods_train(name, build):
    shape = SHAPES[name]
    placements = {counts.houlsby: adapter.HOULSBY, counts.pfeiffer: adapter.PFEIFFER}
    with torch.device("meta"):
        model = build()
        assert size(model) == counts.full(shape)
        for count, targets in placements.items():
            if shape.n_cross:  # the attention to the encoder has no adapter
                targets = tuple(t.replace("o_proj", "attention.o_proj") for t in targets)
            adapter.add(model, adapter.AdapterConfig(width=48, targets=targets))
            assert count(shape, 48) == sum(trainable(model).values())
            adapter.remove(model)
        if shape.biases:
            bitfit.add(model)
            assert counts.bitfit(shape) == sum(trainable(model).values())


def test_the_papers_own_numbers():
    """Hu et al., table 4: 4.7 M and 37.7 M trainable parameters of GPT-3's 175 B."""
    assert counts.lora(SHAPES["GPT-3"], 1) == 4_718_592
    assert counts.lora(SHAPES["GPT-3"], 8) == 37_748_736
    assert round(counts.full(SHAPES["GPT-3"]) / 1e9) == 175


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (lambda s: counts.lora(s, 0), r"r \(0\) must lie between 1 and 768: q_proj"),
        (lambda s: counts.lora(s, 769), r"r \(769\)"),
        (
            lambda s: counts.lora(s, 8, ["gate_proj"]),
            "no map is named 'gate_proj': there are q_proj",
        ),
        (lambda s: counts.houlsby(s, 0), "m must be at least 1, got 0"),
        (lambda s: counts.pfeiffer(s, -1), "m must be at least 1"),
        (lambda s: counts.prompt(s, 0), "P must be at least 1"),
        (lambda s: counts.prefix(s, 0), "P must be at least 1"),
        (lambda s: counts.prefix_reparametrised(s, 3, 0), "hidden must be at least 1"),
    ],
)
def test_counts_refuse(count, message):
    with pytest.raises(ValueError, match=message):
        count(Shape())
