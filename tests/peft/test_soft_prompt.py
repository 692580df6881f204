"""Soft prompts equal those of the peft library, on its models and on ours, and leave no trace."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft import PromptEncoderConfig as TheirEncoderConfig
from torch import Tensor, nn
from transformers import BertConfig as TheirBertConfig
from transformers import (
    BertForQuestionAnswering,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
)
from transformers import (
    BertForSequenceClassification as TheirBert,
)
from transformers import GemmaConfig as TheirGemmaConfig
from transformers import GPT2Config as TheirGPT2Config
from transformers import RobertaConfig as TheirRobertaConfig
from transformers import RobertaForSequenceClassification as TheirRoberta
from transformers import T5Config as TheirT5Config

from llm_anatomy.cache import KVCache
from llm_anatomy.models.bert import BertForQuestionAnswering as Spans
from llm_anatomy.models.bert import BertForSequenceClassification
from llm_anatomy.models.gemma import Gemma
from llm_anatomy.models.gpt2 import GPT2
from llm_anatomy.models.roberta import RobertaForSequenceClassification
from llm_anatomy.models.t5 import T5
from llm_anatomy.peft import soft_prompt
from llm_anatomy.peft.calls import widen
from llm_anatomy.peft.soft_prompt import (
    PromptEncoder,
    PromptEncoderConfig,
    SoftPrompt,
    SoftPromptConfig,
    nearest_tokens,
    prepend,
)
from llm_anatomy.peft.targets import trainable
from tests.parity import randomise, twin
from tests.peft.twins import refused

B, T, P, D, V = 3, 7, 4, 12, 31


def gpt2() -> nn.Module:
    config = TheirGPT2Config(
        vocab_size=V, n_embd=D, n_layer=2, n_head=3, n_positions=24, bos_token_id=0, eos_token_id=0
    )
    return randomise(GPT2LMHeadModel(config))


def bert() -> nn.Module:
    config = TheirBertConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=24,
        num_labels=5,
    )
    return randomise(TheirBert(config))


def t5() -> nn.Module:
    config = TheirT5Config(
        vocab_size=V,
        d_model=D,
        d_kv=4,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=2,
        d_ff=17,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return randomise(T5ForConditionalGeneration(config))


def gemma() -> nn.Module:
    """Its table scales the vectors that it holds."""
    config = TheirGemmaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=24,
    )
    return randomise(GemmaForCausalLM(config))


def roberta(pad_id: int) -> nn.Module:
    config = TheirRobertaConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=24,
        type_vocab_size=1,
        pad_token_id=pad_id,
    )
    return randomise(TheirRoberta(config))


def batch() -> tuple[Tensor, Tensor]:
    """Tokens, and a mask with padding on the right."""
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1, 5:] = keep[2, 2:] = False
    return torch.randint(1, V, (B, T)), keep


THEIRS = {
    "CAUSAL_LM": (gpt2, GPT2, "wte"),
    "SEQ_CLS": (bert, BertForSequenceClassification, "word_embeddings"),
    "SEQ_2_SEQ_LM": (t5, T5, "encoder.embed_tokens"),
}


def labels(task: str, tokens: Tensor, keep: Tensor) -> Tensor:
    other = tokens.roll(1, 0).masked_fill(~keep, -100)
    return torch.tensor([4, 0, 2]) if task == "SEQ_CLS" else other


def call_theirs(task: str, model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits at the text, and the loss."""

    def call(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=tokens, attention_mask=keep.long(), labels=labels(task, tokens, keep))
        logits = out.logits[:, -T:] if task == "CAUSAL_LM" else out.logits
        return logits, out.loss

    return call


def call_ours(task: str, model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def call(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        wanted = labels(task, tokens, keep)
        if task == "SEQ_2_SEQ_LM":
            logits = model(tokens, model.target_of(wanted), keep)
        else:
            logits = model(tokens, keep=keep)
        if task == "CAUSAL_LM":
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        else:
            loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten())
        return logits, loss

    return call


def peft_of(task: str, kind: str) -> PeftModel:
    """A model of transformers with peft's prompt on it, every weight of it random."""
    if kind == "prompt":
        config = PromptTuningConfig(task_type=task, num_virtual_tokens=P)
    else:
        config = TheirEncoderConfig(
            task_type=task,
            num_virtual_tokens=P,
            encoder_hidden_size=9,
            encoder_reparameterization_type=kind.upper(),
        )
    model = get_peft_model(THEIRS[task][0](), config)
    for p in model.prompt_encoder.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def config_for(kind: str, embedding: str = "token_embedding") -> object:
    if kind == "prompt":
        return SoftPromptConfig(n_tokens=P, embedding=embedding)
    return PromptEncoderConfig(n_tokens=P, kind=kind, d_hidden=9, embedding=embedding)


def pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters that mean the same; peft may have more vectors, which no output depends on."""
    theirs_by_name = dict(theirs.named_parameters())
    found = [(ours.embedding, theirs_by_name["embedding.weight"])]
    if isinstance(ours, PromptEncoder):
        if ours.lstm is not None:
            found += [
                (p, theirs_by_name[f"lstm_head.{n}"]) for n, p in ours.lstm.named_parameters()
            ]
        for i, layer in enumerate(ours.layers):
            for n, p in layer.named_parameters():
                found.append((p, theirs_by_name[f"mlp_head.{2 * i}.{n}"]))
    return found


def copy_prompt(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        for p, q in pairs(ours, theirs):
            p.copy_(q[: len(p)])


# Before an encoder-decoder, peft's LSTM reads on into a half of the prompt that it does not use.
KINDS = [
    (task, kind)
    for task in THEIRS
    for kind in ("prompt", "mlp", "lstm")
    if (task, kind) != ("SEQ_2_SEQ_LM", "lstm")
]


@pytest.mark.parametrize(("task", "kind"), KINDS)
@pytest.mark.parametrize("on", ["ours", "theirs"])
def test_outputs_and_gradients_equal_those_of_peft(task, kind, on):
    theirs = peft_of(task, kind)
    build, ours_class, table = THEIRS[task]
    if on == "ours":
        ours = twin(build(), ours_class)
        place = soft_prompt.add(ours, config_for(kind))
        call = call_ours(task, ours)
    else:
        ours = build()
        place = soft_prompt.add(ours, config_for(kind, table))
        call = call_theirs(task, ours)
    copy_prompt(place.source, theirs.prompt_encoder["default"])
    tokens, keep = batch()
    got, loss = call(tokens, keep)
    want, their_loss = call_theirs(task, theirs)(tokens, keep)
    if on == "ours" and task == "CAUSAL_LM":  # peft also counts what the prompt says comes first
        their_loss = F.cross_entropy(
            want[:, :-1].flatten(0, 1), labels(task, tokens, keep)[:, 1:].flatten()
        )
    read = keep if task == "CAUSAL_LM" else torch.ones(len(want), *want.shape[1:-1]).bool()
    torch.testing.assert_close(got[read], want[read])
    torch.testing.assert_close(loss, their_loss)
    loss.backward()
    their_loss.backward()
    for p, q in pairs(place.source, theirs.prompt_encoder["default"]):
        torch.testing.assert_close(p.grad, q.grad[: len(p)])
    assert {n.partition(".")[0] for n in trainable(ours)} == {"soft_prompt"}
    assert all(p.grad is None for n, p in ours.named_parameters() if "soft_prompt" not in n)


@pytest.mark.parametrize("build", [lambda: twin(gpt2(), GPT2), lambda: twin(gemma(), Gemma)])
def test_prompt_is_the_same_as_tokens_with_its_vectors(build):
    model = build()
    text, tokens = torch.tensor([[5, 9, 2, 5]]), torch.randint(V, (1, T))
    hard = model(torch.cat((text, tokens), dim=1))[:, 4:]
    config = SoftPromptConfig(n_tokens=4, init="text", text=tuple(text[0].tolist()))
    soft_prompt.add(model, config)
    torch.testing.assert_close(model(tokens), hard)


@pytest.mark.parametrize("on", ["ours", "theirs"])
def test_before_a_table_that_scales_it_equals_that_of_peft(on):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = get_peft_model(gemma(), config).eval()
    ours = twin(gemma(), Gemma) if on == "ours" else gemma()
    table = "token_embedding" if on == "ours" else "embed_tokens"
    place = soft_prompt.add(ours, SoftPromptConfig(n_tokens=P, embedding=table))
    copy_prompt(place.source, theirs.prompt_encoder["default"])
    tokens = torch.randint(1, V, (B, T))
    got = ours(tokens) if on == "ours" else ours(input_ids=tokens).logits
    torch.testing.assert_close(got, theirs(input_ids=tokens).logits[:, -T:])


@pytest.mark.parametrize("pad_id", [0, 1])
@pytest.mark.parametrize("on", ["ours", "theirs"])
def test_the_prompt_is_no_padding(on, pad_id):
    """RoBERTa gives all padding one position; peft, which gives it vectors, counts the prompt."""
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    theirs = get_peft_model(roberta(pad_id), config).eval()
    ours = twin(roberta(pad_id), RobertaForSequenceClassification)
    ours = ours if on == "ours" else roberta(pad_id)
    table = "token_embedding" if on == "ours" else "word_embeddings"
    place = soft_prompt.add(ours, SoftPromptConfig(n_tokens=P, embedding=table))
    copy_prompt(place.source, theirs.prompt_encoder["default"])
    tokens = torch.randint(2, V, (B, T))
    got = ours(tokens) if on == "ours" else ours(input_ids=tokens).logits
    torch.testing.assert_close(got, theirs(input_ids=tokens).logits)


def test_labels_of_a_whole_text_stay():
    model = bert()
    model.config.problem_type = "multi_label_classification"
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P, embedding="word_embeddings"))
    tokens, wanted = torch.randint(1, V, (B, T)), torch.rand(B, 5)
    out = model(input_ids=tokens, labels=wanted)
    loss = F.binary_cross_entropy_with_logits(out.logits, wanted)
    torch.testing.assert_close(out.loss, loss)
    with pytest.raises(ValueError, match=r"Target size .*3, 7"):  # as many as there are tokens
        model(input_ids=tokens, labels=torch.rand(B, T))


def test_answers_are_found_in_the_text_alone():
    spans = bert().config
    spans.num_labels = 2
    theirs = randomise(BertForQuestionAnswering(spans))
    ours = twin(theirs, Spans)
    tokens = torch.randint(1, V, (B, T))
    first, last = torch.tensor([0, 2, T - 1]), torch.tensor([1, T - 1, T])  # T: no answer here
    config = SoftPromptConfig(n_tokens=P, embedding="word_embeddings")
    place = soft_prompt.add(theirs, config)
    out = theirs(input_ids=tokens, start_positions=first, end_positions=last)
    assert out.start_logits.shape == out.end_logits.shape == (B, T)
    in_tuple = theirs(tokens, return_dict=False)
    torch.testing.assert_close(in_tuple, (out.start_logits, out.end_logits))
    other = soft_prompt.add(ours, SoftPromptConfig(n_tokens=P))
    with torch.no_grad():
        other.source.embedding.copy_(place())
    torch.testing.assert_close(ours(tokens), in_tuple)
    soft_prompt.remove(theirs)
    vectors = prepend(place(), theirs.bert.embeddings.word_embeddings(tokens))
    plain = theirs(inputs_embeds=vectors, start_positions=first + P, end_positions=last + P)
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(out.start_logits, plain.start_logits[:, P:])


@pytest.mark.parametrize("pieces", [(7,), (1, 1, 5), (3, 4)])
@pytest.mark.parametrize("capacity", [None, 20])
def test_with_caches_the_prompt_is_read_once(pieces, capacity):
    model = twin(gpt2(), GPT2)
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P))
    tokens, keep = batch()
    with torch.no_grad():
        want = model(tokens, keep)
        caches, at, got = [KVCache(capacity) for _ in range(2)], 0, []
        for n in pieces:
            got.append(model(tokens[:, at : at + n], keep[:, : at + n], caches=caches))
            at += n
    torch.testing.assert_close(torch.cat(got, dim=1)[keep], want[keep])
    assert len(caches[0]) == P + T


def test_generation_in_transformers_equals_that_of_peft():
    theirs = peft_of("CAUSAL_LM", "prompt")
    ours = gpt2()
    place = soft_prompt.add(ours, config_for("prompt", "wte"))
    copy_prompt(place.source, theirs.prompt_encoder["default"])
    tokens = torch.randint(1, V, (2, 5))
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    got = ours.generate(tokens, attention_mask=mask, **asked)
    assert torch.equal(got, theirs.generate(input_ids=tokens, attention_mask=mask, **asked))


def test_encoder_alone_takes_the_prompt_by_hand():
    model = twin(t5(), T5)
    place = soft_prompt.add(model, SoftPromptConfig(n_tokens=P))
    tokens, keep = batch()
    memory = model.encoder_hidden(prepend(place(), model.embed(tokens)), widen(keep, P))
    target = torch.randint(V, (B, 5))
    got = model.decode(target, memory, widen(keep, P))
    torch.testing.assert_close(got, model(tokens, target, keep))


@pytest.mark.parametrize("task", THEIRS)
def test_removed_it_leaves_no_trace(task):
    build, ours_class, _ = THEIRS[task]
    model = twin(build(), ours_class)
    frozen = next(model.parameters()).requires_grad_(False)
    tokens, keep = batch()
    call = call_ours(task, model)
    before, tree = call(tokens, keep)[0], str(model)
    state = copy.deepcopy(model.state_dict())
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P))
    with_it = call(tokens, keep)[0]
    assert with_it.shape == before.shape and not torch.allclose(with_it, before)
    soft_prompt.remove(model)
    assert torch.equal(call(tokens, keep)[0], before)
    assert str(model) == tree
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    with pytest.raises(ValueError, match="does not carry a soft prompt"):
        soft_prompt.remove(model)


def test_a_copy_has_a_prompt_of_its_own():
    model = twin(gpt2(), GPT2)
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P))
    tokens = torch.randint(V, (B, T))
    other, before = copy.deepcopy(model), model(tokens)
    with torch.no_grad():
        other.soft_prompt.source.embedding.add_(1.0)
    assert torch.equal(model(tokens), before)
    assert not torch.allclose(other(tokens), before)


def test_a_call_that_fails_leaves_nothing_behind():
    model = twin(gpt2(), GPT2)
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P))
    tokens = torch.randint(V, (1, T))
    want, plain = model(tokens), model.embed(tokens)
    with pytest.raises(ValueError, match="positions"):
        model(torch.randint(V, (1, 21)))  # 24 with the prompt would be one too many
    with pytest.raises(ValueError, match="token ids"):
        model(torch.full((1, T), V))
    assert torch.equal(model.embed(tokens), plain)
    assert torch.equal(model(tokens), want)


def test_the_network_can_be_dropped():
    model = twin(gpt2(), GPT2)
    place = soft_prompt.add(model, PromptEncoderConfig(n_tokens=P, kind="lstm", d_hidden=5))
    tokens = torch.randint(V, (B, T))
    before = model(tokens)
    soft_prompt.drop_encoder(model)
    assert isinstance(place.source, SoftPrompt)
    assert torch.equal(model(tokens), before)
    assert trainable(model) == {"soft_prompt.source.embedding": P * D}
    with pytest.raises(ValueError, match="no network to drop"):
        soft_prompt.drop_encoder(model)


def test_what_is_kept_of_the_network_has_no_dropout(tmp_path):
    model = twin(gpt2(), GPT2)
    config = PromptEncoderConfig(n_tokens=P, kind="lstm", d_hidden=5, dropout=0.5)
    place = soft_prompt.add(model, config)
    assert not place.source.lstm.training  # as the model
    want = place()
    assert torch.equal(place(), want)
    model.train()
    assert not torch.equal(place(), place())
    soft_prompt.save(model, tmp_path)
    assert place.source.lstm.training
    soft_prompt.drop_encoder(model)
    assert torch.equal(place(), want)
    other = twin(gpt2(), GPT2)
    assert torch.equal(soft_prompt.load(other, tmp_path)(), want)


@pytest.mark.parametrize("init", ["random", "vocabulary", "text"])
def test_first_vectors(init):
    text = (3, 8, 5) if init == "text" else ()
    model = twin(gpt2(), GPT2)
    place = soft_prompt.add(model, SoftPromptConfig(n_tokens=P, init=init, text=text))
    vectors, table = place(), model.token_embedding.weight
    if init == "random":
        assert vectors.abs().max() <= 0.5
    elif init == "vocabulary":
        assert torch.equal(vectors, table[nearest_tokens(vectors, table)[0][:, 0]])
    else:
        assert torch.equal(vectors, table[[3, 8, 5, 3]])


def test_a_long_text_is_cut():
    model = twin(gpt2(), GPT2)
    place = soft_prompt.add(model, SoftPromptConfig(n_tokens=2, init="text", text=(3, 8, 5)))
    assert torch.equal(place(), model.token_embedding.weight[[3, 8]])


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
@pytest.mark.parametrize("task", THEIRS)
def test_files_of_peft_load_here(task, kind, tmp_path):
    theirs = peft_of(task, kind)
    if task == "SEQ_CLS":
        nn.init.normal_(theirs.base_model.classifier.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    build, ours_class, table = THEIRS[task]
    tokens, keep = batch()
    want = call_theirs(task, theirs)(tokens, keep)[0]
    read = keep if task == "CAUSAL_LM" else torch.ones(len(want), *want.shape[1:-1]).bool()
    for model, name, call in (
        (build(), table, call_theirs),
        (twin(build(), ours_class), "token_embedding", call_ours),
    ):
        soft_prompt.load(model, tmp_path, name)
        torch.testing.assert_close(call(task, model)(tokens, keep)[0][read], want[read])


@pytest.mark.parametrize("kind", ["prompt", "mlp"])
@pytest.mark.parametrize("task", THEIRS)
@pytest.mark.parametrize("on", ["ours", "theirs"])
def test_files_of_ours_load_in_peft(task, kind, on, tmp_path):
    build, ours_class, table = THEIRS[task]
    model = twin(build(), ours_class) if on == "ours" else build()
    config = config_for(kind, "token_embedding" if on == "ours" else table)
    if task == "SEQ_CLS":
        head = {"also_train": ("classifier",)}
        config = type(config)(**(vars(config) | head))
    soft_prompt.add(model, config)
    if task == "SEQ_CLS":
        nn.init.normal_(model.classifier.weight)
    call = call_ours if on == "ours" else call_theirs
    tokens, keep = batch()
    want = call(task, model)(tokens, keep)[0]
    soft_prompt.save(model, tmp_path, task)
    theirs = PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    got = call_theirs(task, theirs)(tokens, keep)[0]
    read = keep if task == "CAUSAL_LM" else torch.ones(len(want), *want.shape[1:-1]).bool()
    torch.testing.assert_close(got[read], want[read])
    again = twin(build(), ours_class)
    soft_prompt.load(again, tmp_path)
    torch.testing.assert_close(call_ours(task, again)(tokens, keep)[0][read], want[read])


def test_a_prompt_for_another_base_is_refused(tmp_path):
    model = twin(gpt2(), GPT2)
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P))
    soft_prompt.save(model, tmp_path, "CAUSAL_LM")
    other = twin(gpt2(), GPT2)
    nn.init.normal_(other.token_embedding.weight)
    with pytest.raises(ValueError, match="made for another base"):
        soft_prompt.load(other, tmp_path)
    config = TheirGPT2Config(vocab_size=V, n_embd=15, n_layer=1, n_head=3, n_positions=24)
    wider = twin(GPT2LMHeadModel(config), GPT2)
    with pytest.raises(ValueError, match=r"needs a prompt of shape \(4, 15\)"):
        soft_prompt.load(wider, tmp_path)
    headless = twin(bert(), BertForSequenceClassification)
    soft_prompt.add(headless, SoftPromptConfig(n_tokens=P, also_train=("classifier",)))
    soft_prompt.save(headless, tmp_path, "SEQ_CLS")
    for base in (other, wider):
        assert all(p.requires_grad for p in base.parameters())
        assert not hasattr(base, "soft_prompt")


def test_with_a_trained_table_it_is_saved_and_loaded(tmp_path):
    """The base is told by a matrix that does not train."""
    model = twin(bert(), BertForSequenceClassification)
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P, also_train=("token_embedding",)))
    nn.init.normal_(model.bert.token_embedding.weight)
    tokens = torch.randint(1, V, (B, T))
    soft_prompt.save(model, tmp_path)
    other = twin(bert(), BertForSequenceClassification)
    soft_prompt.load(other, tmp_path)
    torch.testing.assert_close(other(tokens), model(tokens))
    third = twin(bert(), BertForSequenceClassification)
    nn.init.normal_(third.bert.position_embedding.weight)
    nn.init.normal_(third.bert.segment_embedding.weight)
    assert "another base" in refused(third, lambda m: soft_prompt.load(m, tmp_path))


def test_a_head_is_saved_with_its_buffers(tmp_path):
    def build() -> nn.Module:
        model = bert()
        model.classifier = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 5))
        return randomise(model)

    model = build()
    config = SoftPromptConfig(n_tokens=P, embedding="word_embeddings", also_train=("classifier",))
    soft_prompt.add(model, config)
    tokens = torch.randint(1, V, (B, T))
    model.train()(input_ids=tokens)  # means and variances move
    soft_prompt.save(model.eval(), tmp_path)
    other = build()
    soft_prompt.load(other, tmp_path, "word_embeddings")
    torch.testing.assert_close(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_nothing_of_the_base_is_overwritten(tmp_path):
    model = twin(gpt2(), GPT2)
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P))
    soft_prompt.save(model, tmp_path)
    other = twin(gpt2(), GPT2)
    other.soft_prompt = nn.Linear(2, 2)
    for put in (
        lambda m: soft_prompt.add(m, SoftPromptConfig()),
        lambda m: soft_prompt.load(m, tmp_path),
    ):
        assert "soft_prompt of its own" in refused(other, put)


def test_nearest_tokens():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0], [-1.0, 0.0]])
    vectors = torch.tensor([[5.0, 0.1], [2.0, 1.9]])
    ids, likeness = nearest_tokens(vectors, table, k=2)
    assert ids.tolist() == [[0, 2], [2, 0]]
    assert (likeness <= 1).all() and likeness[1, 0] > 0.99
    ids, distance = nearest_tokens(vectors, table, k=4, cosine=False)
    assert ids[0].tolist() == [2, 0, 1, 3]
    torch.testing.assert_close(distance[1, 0], (vectors[1] - table[2]).norm())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: soft_prompt.add(m, SoftPromptConfig(embedding="wte")), "0 tables of vectors"),
        (
            lambda m: soft_prompt.add(m, SoftPromptConfig(init="text", text=(V,))),
            "between 0 and 30",
        ),
        (
            lambda m: soft_prompt.add(m, SoftPromptConfig(also_train=("head",))),
            "no module is called head",
        ),
        (lambda m: soft_prompt.save(m, "/nowhere"), "does not carry a soft prompt"),
        (lambda m: soft_prompt.drop_encoder(m), "does not carry a soft prompt"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_base_unharmed(spoil, message):
    model = twin(gpt2(), GPT2)
    tree = str(model)
    with pytest.raises(ValueError, match=message):
        spoil(model)
    assert str(model) == tree
    assert all(p.requires_grad for p in model.parameters())


def test_twice_is_refused():
    model = twin(gpt2(), GPT2)
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P))
    with pytest.raises(ValueError, match="carries a soft prompt already"):
        soft_prompt.add(model, SoftPromptConfig(n_tokens=P))


def test_a_table_that_the_model_does_not_read_is_noticed():
    model = t5()
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P, embedding="shared"))
    tokens = torch.randint(V, (B, T))
    with pytest.raises(ValueError, match="did not look tokens up"):
        model(input_ids=tokens, labels=tokens)


def test_vectors_in_the_place_of_tokens_are_refused():
    model = gpt2()
    soft_prompt.add(model, SoftPromptConfig(n_tokens=P, embedding="wte"))
    with pytest.raises(ValueError, match="must be given token ids"):
        model(inputs_embeds=torch.randn(B, T, D))


@pytest.mark.usefixtures("unchecked")
def test_tokens_of_another_width_cannot_be_near():
    with pytest.raises(ValueError, match="the prompt has width 3, the tokens 4"):
        nearest_tokens(torch.ones(2, 3), torch.ones(5, 4))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("text", [(1.9,), ("a",)])
def test_a_text_that_holds_no_ids_is_refused(text):
    with pytest.raises(ValueError, match="must hold token ids"):
        SoftPromptConfig(init="text", text=text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SoftPromptConfig(n_tokens=0), "n_tokens must be a whole number"),
        (lambda: SoftPromptConfig(init="words"), "init must be one of random"),
        (lambda: SoftPromptConfig(init="text"), "goes with a text"),
        (lambda: SoftPromptConfig(text=(1,)), "goes with a text"),
        (lambda: PromptEncoderConfig(kind="gru"), "kind must be one of mlp"),
        (lambda: PromptEncoderConfig(d_hidden=0), "d_hidden must be"),
        (lambda: PromptEncoderConfig(dropout=1.0), "dropout must be"),
        (lambda: nearest_tokens(torch.ones(2, 3), torch.ones(5, 3), k=6), "between 1 and the 5"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
