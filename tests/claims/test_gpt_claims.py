"""The sources' claims on GPT, executed. The ledger is claims.yml."""

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from pybtex.database import parse_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm_anatomy import objectives, tiny_world
from llm_anatomy.models import gpt1, gpt2
from llm_anatomy.tiny_world import in_context, stories, words
from tests.claims import tiny

EVERYWHERE = torch.ones(8, dtype=torch.bool)


def gpt1_tiny(kind: str = "OpenAIGPTLMHeadModel", **options) -> transformers.PreTrainedModel:
    config = transformers.OpenAIGPTConfig(
        vocab_size=tiny.VOCAB,
        n_embd=tiny.WIDTH,
        n_layer=tiny.LAYERS,
        n_head=tiny.HEADS,
        n_positions=64,
        pad_token_id=0,
        **options,
    )
    return tiny.randomise(getattr(transformers, kind)(config))


# --- who, and when ------------------------------------------------------------------------------


def test_the_name_stands_in_the_title_of_the_paper() -> None:
    """C090, C242, C251: Generative Pre-Training, 2018, by OpenAI; GPT-2 is theirs as well."""
    path = Path(__file__).resolve().parents[2] / "references.bib"
    entries = parse_file(str(path)).entries
    first, second = entries["radford2018improving"], entries["radford2019language"]
    assert first.fields["title"].endswith("Generative Pre-Training")
    assert first.fields["year"] == "2018"
    assert first.fields["institution"] == second.fields["institution"] == "OpenAI"


# --- which way it looks ---------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny.gpt2, gpt1_tiny])
def test_a_gpt_sees_what_is_on_its_left_and_nothing_else(build) -> None:
    """C048, C132, C206, C247: a change at one position moves it and what follows."""
    model, ids = build(), tiny.tokens()
    for position in range(8):
        before, after = model(ids).logits, model(tiny.changed(ids, position)).logits
        assert torch.equal(tiny.moved(before, after), torch.arange(8) >= position)


def test_bert_sees_both_sides() -> None:
    """C206: in an encoder a change at the end moves every position."""
    model, ids = tiny.bert(), tiny.tokens()
    before = model(ids).last_hidden_state
    after = model(tiny.changed(ids, 7)).last_hidden_state
    assert torch.equal(tiny.moved(before, after), EVERYWHERE)


def test_the_bank_has_one_vector_in_gpt_and_two_in_bert() -> None:
    """C248: two sentences that differ after "bank", for any weights."""
    sentences = ("i went to the bank to deposit cash", "i went to the bank to sit down")
    known = {word: 5 + i for i, word in enumerate(dict.fromkeys(" ".join(sentences).split()))}
    one, other = (torch.tensor([[known[w] for w in s.split()]]) for s in sentences)
    bank = sentences[0].split().index("bank")
    for seed in range(3):
        gpt = tiny.randomise(tiny.gpt2().transformer, seed)
        bert = tiny.randomise(tiny.bert(), seed)
        a, b = gpt(one).last_hidden_state, gpt(other).last_hidden_state
        assert torch.equal(a[:, : bank + 2], b[:, : bank + 2])
        assert (a[:, bank + 2 :] != b[:, bank + 2 :]).any(-1).all()  # later positions may tell
        a, b = bert(one).last_hidden_state, bert(other).last_hidden_state
        assert (a[:, bank] - b[:, bank]).abs().max() > 1e-3


# --- what it is trained on ------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpt1_tiny, tiny.gpt2])
def test_pre_training_predicts_the_next_token_and_needs_no_label(build) -> None:
    """C049, C259, C262: GPT-1 and GPT-2 shift the text itself; no token is hidden or missing."""
    model, ids = build(), tiny.tokens(batch=3)
    inputs, targets = objectives.causal_lm(ids)
    assert torch.equal(inputs, ids[:, :-1])  # every token is read as it is
    assert torch.equal(targets, ids[:, 1:])
    ours = objectives.cross_entropy(model(inputs).logits, targets)
    torch.testing.assert_close(ours, model(ids, labels=ids).loss)


def test_filling_a_gap_is_another_objective() -> None:
    """C049: to predict a missing word, BERT hides it and reads the rest."""
    ids = tiny.tokens(batch=3)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = objectives.masked_lm(
        ids, ids > 0, mask_id=4, vocab_size=tiny.VOCAB, generator=generator, share=0.3
    )
    hidden = targets != objectives.IGNORED
    assert (inputs[hidden] == 4).any()
    assert torch.equal(targets[hidden], ids[hidden])  # at its own place, not one earlier
    assert not (objectives.causal_lm(ids)[0] == 4).any()


def test_fine_tuning_needs_labels_and_weights_that_pre_training_has_not() -> None:
    """C050, C203, C260: the two stages have different losses; the second is supervised."""
    model, ids = gpt1_tiny("OpenAIGPTForSequenceClassification", num_labels=3), tiny.tokens(batch=4)
    head = [name for name, _ in model.named_parameters() if not name.startswith("transformer")]
    assert head == ["score.weight"]
    assert not [name for name, _ in gpt1_tiny().named_parameters() if "score" in name]
    assert model(ids).loss is None
    model(ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert model.score.weight.grad.abs().max() > 0
    one, other = (model(ids, labels=torch.tensor(y)).loss for y in ([0, 1, 2, 0], [1, 2, 0, 1]))
    assert one != other  # what is learned depends on the labels


def test_fine_tuning_puts_a_linear_layer_on_the_last_token() -> None:
    """C243: the pre-trained decoder's output at the last real token, times one matrix."""
    model, ids = gpt1_tiny("OpenAIGPTForSequenceClassification", num_labels=3), tiny.tokens(batch=2)
    hidden = model.transformer(ids).last_hidden_state
    torch.testing.assert_close(model(ids).logits, hidden[:, -1] @ model.score.weight.T)


def test_45_terabytes_cannot_be_what_gpt3_was_trained_on() -> None:
    """C264: Brown et al., section 2.2 and table 2.2: 45 TB before the filter, 570 GB after it.

    300 billion tokens were seen in training: as 45 TB they would be 150 bytes each.
    """
    raw, filtered, seen = 45e12, 570e9, 300e9
    assert round(raw / filtered) == 79
    assert raw / seen == 150
    assert max(map(len, words.vocabulary().words)) < 150


def test_gpt1_read_books_and_gpt2_pages() -> None:
    """C201, C256, C257: whole books in 2018, linked pages in 2019.

    Zhu et al., table 2, count the books; Radford et al. 2019, section 2.1, the pages: 800w is
    800 times 万, ten thousand.
    """
    books, sentences, words_in_books = 11_038, 74_004_228, 984_846_357
    assert round(words_in_books / sentences) == 13  # as the table itself says
    words_a_book = words_in_books / books
    assert 80_000 < words_a_book < 100_000  # the length of a novel, and no page has it
    pages, size = 800 * 10_000, 40e9
    assert pages == 8_000_000
    assert size / pages == 5_000  # bytes, under a thousand words


def test_gpt1_read_a_quarter_of_the_words_and_used_each_of_them() -> None:
    """C207: Devlin et al., appendix A.4, give the words and the sizes of the batches.

    From the same text next-token prediction draws a loss at all positions but one, filling in
    gaps at 15 per cent of them.
    """
    books, wikipedia = 800e6, 2_500e6
    assert books / (books + wikipedia) < 1 / 4
    assert 128_000 / 32_000 == 4  # words in a batch of BERT and of GPT, a million batches each
    ids = tiny.tokens(batch=200, length=64)
    generator = torch.Generator().manual_seed(0)
    options = {"mask_id": 4, "vocab_size": tiny.VOCAB, "generator": generator}
    gaps = objectives.masked_lm(ids, torch.ones_like(ids, dtype=torch.bool), **options)[1]
    nexts = objectives.causal_lm(ids)[1]
    assert (nexts != objectives.IGNORED).all()
    assert nexts.numel() > 6 * (gaps != objectives.IGNORED).sum()


# --- how good it was ------------------------------------------------------------------------------

TWELVE = {  # Radford et al. 2018, tables 2 to 4: the best before, of any kind, and GPT-1
    "MNLI": (80.6, 82.1),
    "SNLI": (89.3, 89.9),
    "SciTail": (83.3, 88.3),
    "QNLI": (82.3, 88.1),
    "RTE": (61.7, 56.0),
    "Story Cloze": (77.6, 86.5),
    "RACE": (53.3, 59.0),
    "CoLA": (35.0, 45.4),
    "SST-2": (93.2, 91.3),
    "MRPC": (86.0, 82.3),
    "STS-B": (81.0, 82.0),
    "QQP": (66.1, 70.3),
}
# Radford et al. 2019, table 3: the best before, the smallest GPT-2, the largest
PERPLEXITY = {
    "LAMBADA": (99.8, 35.13, 8.63),
    "WikiText-2": (39.14, 29.41, 18.34),
    "PTB": (46.54, 65.85, 35.76),
    "enwik8": (0.99, 1.16, 0.93),
    "text8": (1.08, 1.17, 0.98),
    "WikiText-103": (18.3, 37.50, 17.48),
    "One Billion Words": (21.8, 75.20, 42.16),
}
CHILDREN = {"common nouns": (85.7, 87.65, 93.30), "named entities": (82.3, 83.4, 89.05)}


def test_gpt1_was_best_on_nine_of_twelve() -> None:
    """C245: by its own tables; the gains of the abstract are found in them."""
    gains = {task: round(gpt - before, 1) for task, (before, gpt) in TWELVE.items()}
    assert len(gains) == 12
    assert {task for task, gain in gains.items() if gain < 0} == {"RTE", "SST-2", "MRPC"}
    assert (gains["Story Cloze"], gains["RACE"], gains["MNLI"]) == (8.9, 5.7, 1.5)


def test_gpt2_was_compared_on_other_tasks_than_gpt1() -> None:
    """C258: no task in common; larger is better on each, and seven of eight data sets are records.

    The smallest of its four sizes has as many layers and features as GPT-1, but read WebText.
    """
    others = {"Winograd", "CoQA", "CNN and Daily Mail", "WMT-14", "Natural Questions"}
    assert not TWELVE.keys() & {*PERPLEXITY, "Children's Book Test", *others}
    assert all(large < small for _, small, large in PERPLEXITY.values())
    assert all(large > small for _, small, large in CHILDREN.values())
    records = [large < before for before, _, large in PERPLEXITY.values()]
    records.append(all(large > before for before, _, large in CHILDREN.values()))
    assert (len(records), sum(records)) == (8, 7)
    old, new = transformers.OpenAIGPTConfig(), transformers.GPT2Config()
    assert (old.n_layer, old.n_embd) == (new.n_layer, new.n_embd) == (12, 768)


def test_without_fine_tuning_gpt2_was_far_from_the_models_made_for_a_task() -> None:
    """C208, C263: Radford et al. 2019, sections 3.5 to 3.8; its gap is measured in each task."""
    rouge = {"best": 32.75, "first three sentences": 31.55, "GPT-2": 21.40, "random three": 20.98}
    assert list(rouge) == sorted(rouge, key=rouge.get, reverse=True)
    assert rouge["GPT-2"] - rouge["random three"] < 0.5
    french_to_english, best_without_pairs, english_to_french = 11.5, 33.5, 5
    assert english_to_french < french_to_english < best_without_pairs / 2
    coqa, people = 55, 89  # F1; a supervised system with BERT is near people
    assert people - coqa > 30
    answered, open_domain_systems = 4.1, (30, 50)  # per cent of Natural Questions
    assert answered < min(open_domain_systems) / 7


# --- what it is made of ---------------------------------------------------------------------------


def as_encoder_layer(block: nn.Module) -> nn.TransformerEncoderLayer:
    """The weights of a block of GPT-2 in PyTorch's own encoder layer, in pre-norm form."""
    layer = nn.TransformerEncoderLayer(
        tiny.WIDTH,
        tiny.HEADS,
        4 * tiny.WIDTH,
        dropout=0.0,
        activation=lambda x: F.gelu(x, approximate="tanh"),
        batch_first=True,
        norm_first=True,
    ).eval()
    state = {
        "self_attn.in_proj_weight": block.attn.c_attn.weight.T,
        "self_attn.in_proj_bias": block.attn.c_attn.bias,
        "self_attn.out_proj.weight": block.attn.c_proj.weight.T,
        "self_attn.out_proj.bias": block.attn.c_proj.bias,
        "linear1.weight": block.mlp.c_fc.weight.T,
        "linear1.bias": block.mlp.c_fc.bias,
        "linear2.weight": block.mlp.c_proj.weight.T,
        "linear2.bias": block.mlp.c_proj.bias,
        "norm1.weight": block.ln_1.weight,
        "norm1.bias": block.ln_1.bias,
        "norm2.weight": block.ln_2.weight,
        "norm2.bias": block.ln_2.bias,
    }
    layer.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()})
    return layer


def test_a_gpt_block_is_an_encoder_layer_only_under_a_causal_mask() -> None:
    """C091, C202: the same weights; with the mask the same numbers, without it others.

    So it is a decoder: it has the mask, and no cross-attention either.
    """
    model = tiny.gpt2()
    assert tiny.cross_attentions(model) == []
    x = torch.randn(2, 8, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    ahead = torch.ones(8, 8, dtype=torch.bool).triu(1)  # PyTorch: True = may not look
    states = []
    layer = model.transformer.h[0]
    handle = layer.register_forward_hook(lambda _, inputs, out: states.append((inputs[0], out)))
    model(inputs_embeds=x)
    handle.remove()
    inputs, out = states[0]
    out = out[0] if isinstance(out, tuple) else out
    twin = as_encoder_layer(layer)
    with torch.no_grad():
        torch.testing.assert_close(twin(inputs, src_mask=ahead), out, atol=1e-4, rtol=1e-4)
        assert (twin(inputs) - out)[:, :-1].abs().amax(-1).min() > 1e-2
        torch.testing.assert_close(twin(inputs)[:, -1], out[:, -1], atol=1e-4, rtol=1e-4)


def test_each_layer_is_attention_and_a_feed_forward_network() -> None:
    """C092, C251: two sub-blocks a layer, as in the Transformer; nothing else has weights."""
    for model in (tiny.gpt2(), gpt1_tiny()):
        for layer in model.transformer.h:
            parts = {name for name, part in layer.named_children() if list(part.parameters())}
            assert parts == {"attn", "mlp", "ln_1", "ln_2"}


def wiring(block: nn.Module, x: Tensor, parts: tuple[nn.Module, ...]) -> Tensor:
    """What a block gives once its attention and feed-forward layer add nothing."""
    with torch.no_grad():
        for part in parts:
            for parameter in part.parameters():
                parameter.zero_()
        return block(x, torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool).tril())


def test_gpt2_has_the_norms_before_the_sub_blocks_and_one_after_the_last() -> None:
    """C252: with silent sub-blocks a block of GPT-2 is the identity, one of GPT-1 a norm."""
    x = 3 * torch.randn(2, 5, 16) + 1
    new = gpt2.GPT2Block(gpt2.GPT2Config(d_model=16, n_heads=2, d_ff=64)).eval()
    old = gpt1.GPT1Block(gpt1.GPT1Config(d_model=16, n_heads=2)).eval()
    assert torch.equal(wiring(new, x, (new.attention.o_proj, new.ffn.down_proj)), x)
    normed = F.layer_norm(x, (16,))
    expected = F.layer_norm(normed, (16,))
    torch.testing.assert_close(wiring(old, x, (old.attention.o_proj, old.ffn.down_proj)), expected)
    assert isinstance(tiny.gpt2().transformer.ln_f, nn.LayerNorm)
    assert not hasattr(gpt1_tiny().transformer, "ln_f")


# --- how large it is ------------------------------------------------------------------------------


def n_parameters(model_class, config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config).parameters())


def test_gpt1_has_117_million_parameters() -> None:
    """C253."""
    config = transformers.OpenAIGPTConfig()
    assert n_parameters(transformers.OpenAIGPTLMHeadModel, config) == 116_534_784


def test_the_largest_gpt2_has_one_and_a_half_billion_parameters() -> None:
    """C254: four sizes; the largest with 48 layers of width 1600."""
    sizes = {
        124_439_808: (12, 12, 768),
        354_823_168: (24, 16, 1024),
        774_030_080: (36, 20, 1280),
        1_557_611_200: (48, 25, 1600),
    }
    for expected, (n_layer, n_head, n_embd) in sizes.items():
        config = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        assert n_parameters(transformers.GPT2LMHeadModel, config) == expected


def test_gpt3_has_175_billion_parameters_and_not_a_tenth_of_that() -> None:
    """C093, C265, C284: from the configuration in table 2.1 of the paper. 亿 is 10⁸."""
    config = transformers.GPT2Config(n_layer=96, n_head=96, n_embd=12_288, n_positions=2048)
    count = n_parameters(transformers.GPT2LMHeadModel, config)
    assert count == 174_604_259_328
    assert round(count / 1e9) == 175
    assert round(count / 1e8) == 1746  # not 175 亿
    assert count > 9 * 175e8


def test_gpt2_came_out_in_four_steps_each_larger() -> None:
    """C261: Solaiman et al. 2019: February, May, August and November; sizes in millions."""
    released = {2: 124, 5: 355, 8: 774, 11: 1558}
    sizes = ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))
    for millions, (n_layer, n_head, n_embd) in zip(released.values(), sizes, strict=True):
        config = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        assert round(n_parameters(transformers.GPT2LMHeadModel, config) / 1e6) == millions
    assert max(released) - min(released) == 9  # months
    assert list(released.values()) == sorted(released.values())


# --- how it writes --------------------------------------------------------------------------------


def test_it_writes_one_token_at_a_time_and_reads_it_again() -> None:
    """C132, C200: a loop that appends the likeliest token gives what `generate` gives."""
    model, ids = tiny.gpt2(), tiny.tokens(batch=2)
    written = ids
    for _ in range(6):
        nexts = model(written).logits[:, -1].argmax(-1, keepdim=True)
        written = torch.cat((written, nexts), dim=1)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(written, expected)


def test_a_cache_saves_most_of_the_work_and_none_of_the_steps() -> None:
    """C205: the same tokens in as many steps; with the cache by far fewer operations."""
    model, ids = tiny.gpt2(), tiny.tokens(length=4)
    steps, work, written = {}, {}, {}
    for use_cache in (True, False):
        with FlopCounterMode(display=False) as counter:
            steps[use_cache] = tiny.count_calls(
                model.transformer.h[0],
                lambda use_cache=use_cache: written.update(
                    {
                        use_cache: model.generate(
                            ids,
                            attention_mask=torch.ones_like(ids),
                            max_new_tokens=40,
                            do_sample=False,
                            use_cache=use_cache,
                        )
                    }
                ),
            )
        work[use_cache] = counter.get_total_flops()
    assert torch.equal(written[True], written[False])
    assert steps == {True: 40, False: 40}  # one after the other, with or without
    assert work[False] > 10 * work[True]


def test_a_causal_model_learns_from_every_position() -> None:
    """C205: T losses from one pass, the same as from T passes over the prefixes."""
    model, ids = tiny.gpt2(), tiny.tokens()
    at_once = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    one_by_one = [F.cross_entropy(model(ids[:, :t]).logits[0, -1], ids[0, t]) for t in range(1, 8)]
    torch.testing.assert_close(at_once, torch.stack(one_by_one), atol=1e-4, rtol=1e-4)


def written_story(next_words: Callable[[list[str]], dict[str, float]], rng: random.Random) -> list:
    story: list[str] = []
    while len(story) < 60:
        nexts = next_words(story)
        (word,) = rng.choices(list(nexts), list(nexts.values()))
        if word == "[EOS]":
            break
        story.append(word)
    return story


def test_word_by_word_writing_is_coherent_if_the_whole_text_is_in_view() -> None:
    """C204: the true next-word probabilities write nothing but valid stories.

    A writer who counts what follows the last four words loses the thread in nearly all.
    """
    grammar, rng = stories.story_grammar(n_more=1), random.Random(0)
    view = 4
    counts: defaultdict[tuple, Counter] = defaultdict(Counter)
    for story in stories.stories(2000, seed=1, n_more=1):
        text = (*story, "[EOS]")
        for t, word in enumerate(text):
            counts[text[max(0, t - view) : t]][word] += 1

    def short_sighted(story: list[str]) -> dict[str, float]:
        return counts[tuple(story[-view:])]

    valid = {}
    for name, next_words in (("whole", grammar.next_words), ("last four", short_sighted)):
        texts = [written_story(next_words, rng) for _ in range(40)]
        valid[name] = sum(math.isfinite(grammar.log_prob(text)) for text in texts)
    assert valid["whole"] == 40
    assert valid["last four"] < 10


@pytest.mark.parametrize("build", [tiny.gpt2, gpt1_tiny])
def test_the_first_token_counts_to_the_end_of_the_context_and_there_it_ends(build) -> None:
    """C204: 512 positions in GPT-1 and 1,024 in GPT-2; the models here have 64."""
    assert transformers.OpenAIGPTConfig().n_positions == 512
    assert transformers.GPT2Config().n_positions == 1024
    model, ids = build(), tiny.tokens(length=65)
    full = ids[:, :64]
    before, after = model(full).logits, model(tiny.changed(full, 0)).logits
    assert tiny.moved(before, after).all()
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)


# --- learning from examples in the prompt ---------------------------------------------------------


def test_zero_one_and_few_shot_are_one_format() -> None:
    """C266, C269, C274: K examples, then the question; they condition the answer."""
    for n_shots in (0, 1, 3):
        for prompt in in_context.prompts(20, seed=1, n_shots=n_shots):
            assert prompt.words.count("->") == n_shots + 1
            assert prompt.words[-1] == "->"


def test_examples_in_the_prompt_can_help_without_any_change_of_a_weight() -> None:
    """C094, C267, C273: the best possible score rises with the examples; reading trains nothing."""
    best = [in_context.in_context_optimum(n_shots) for n_shots in range(5)]
    assert best == sorted(set(best))
    assert best[1] - best[0] > 0.5
    vocabulary = words.vocabulary()
    config = transformers.GPT2Config(**{**tiny.kwargs_gpt2(), "vocab_size": len(vocabulary)})
    model = tiny.randomise(transformers.GPT2LMHeadModel(config))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prompt = in_context.prompts(1, seed=2, n_shots=3)[0]
    ids = torch.tensor([vocabulary.encode(prompt.words)])
    few, zero = model(ids).logits[0, -1], model(ids[:, -2:]).logits[0, -1]
    assert (few - zero).abs().max() > 1e-3  # the examples condition the answer
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert tiny_world.__doc__


def test_the_first_example_tells_most() -> None:
    """C275, C276: without a name or an example the task can only be guessed, by people as well.

    `in_context_optimum` is the score of the best possible reader of any kind.
    """
    best = [in_context.in_context_optimum(n_shots) for n_shots in range(6)]
    assert best[0] < 1 / 3
    gains = [more - less for less, more in itertools.pairwise(best)]
    assert gains[0] > sum(gains[1:])
    assert best[0] == min(best)


def test_a_description_alone_settles_some_tasks_and_leaves_others_open() -> None:
    """C275, C276, C277: "give the plural" needs no example; "a colour for its size" does.

    So for some tasks zero-shot asks of a model what people can do, and for others it does not.
    """

    def best_guess(fitting: list[in_context.Task], animal: str) -> float:
        answers = Counter(task[animal] for task in fitting)
        return max(answers.values()) / len(fitting)

    described = {"copy": 0, "plural": 1, "translate": 2}
    for animal in in_context.BIG + in_context.SMALL:
        for which in described.values():
            assert best_guess([in_context.FIXED_TASKS[which]], animal) == 1
        assert best_guess(list(in_context.FRESH_TASKS), animal) == 1 / 8
    horse_is_red = [task for task in in_context.FRESH_TASKS if task["horse"] == "red"]
    assert best_guess(horse_is_red, "goat") == 1  # one example, and the big ones are known
    assert best_guess(horse_is_red, "dog") == 1 / 7
