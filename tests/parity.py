"""What it means that a model of ours equals its transformers class, for the tests of all models."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from llm_anatomy.weights import Pretrained, to_hf

logging.disable_progress_bar()

TOLERANCE = {torch.float32: {}, torch.float64: {"atol": 1e-9, "rtol": 1e-9}}

dtypes = st.sampled_from(list(TOLERANCE))


def examples(n: int) -> settings:
    """Try n drawn configurations; the first that fails is reported as it is, which is quick."""
    return settings(max_examples=n, phases=[Phase.generate])


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight: fresh weights are small, zero or one, and hide mistakes.

    Gains of norms are drawn around 1, so that what is generated depends on what is read.
    """
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        gain = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
        nn.init.normal_(p, mean=1.0 if gain else 0.0, std=0.3)
    return model.eval()


def twin(theirs: PreTrainedModel, ours: type[Pretrained]) -> Pretrained:
    """Our model, from the checkpoint that transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return ours.from_pretrained(folder)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the positions that have a label."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def check_gradients(ours: Pretrained, theirs: PreTrainedModel, **tolerance: float) -> None:
    """After both losses went backward: every gradient agrees, and there is none in addition."""
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    buffers = {name: torch.zeros_like(b) for name, b in ours.named_buffers()}
    got = to_hf({**buffers, **gradients}, ours.hf_rules(ours.config))
    want = dict(theirs.named_parameters(remove_duplicate=False))
    got = {name: gradient for name, gradient in got.items() if name in want}
    covered = {id(want[name]) for name in got}
    assert covered == {id(p) for p in theirs.parameters()}, "a parameter of theirs is not ours"
    assert len(got) == len(covered), "a parameter of theirs is two of ours"
    for name, gradient in got.items():
        their_gradient = want[name].grad
        if their_gradient is None:  # a parameter that the loss does not reach
            assert not gradient.any(), name
            continue
        torch.testing.assert_close(
            gradient, their_gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def read(theirs: PreTrainedModel, source: Tensor, target: Tensor, keep: Tensor | None) -> Tensor:
    """Logits of an encoder-decoder of theirs, whose masks hold numbers."""
    mask = None if keep is None else keep.long()
    return theirs(source, attention_mask=mask, decoder_input_ids=target).logits


def check_loss_and_gradients(
    theirs: PreTrainedModel,
    ours: Pretrained,
    source: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    **tolerance: float,
) -> None:
    """Of an encoder-decoder, which makes the input of its decoder from the labels."""
    labels = labels.clone()
    labels[1, 4:] = -100
    mask = None if keep is None else keep.long()
    want = theirs(source, attention_mask=mask, labels=labels).loss
    loss = mean_loss(ours(source, ours.target_of(labels), keep), labels)
    torch.testing.assert_close(loss, want, **tolerance)
    want.backward()
    loss.backward()
    check_gradients(ours, theirs, **tolerance)


def check_dropout(
    theirs: PreTrainedModel, ours: Pretrained, source: Tensor, target: Tensor, keep: Tensor
) -> None:
    """With the same seed an encoder-decoder drops the same features, in the same order."""
    torch.manual_seed(1)
    want = read(theirs.train(), source, target, keep)
    torch.manual_seed(1)
    torch.testing.assert_close(ours.train()(source, target, keep), want)


@torch.no_grad()
def check_generation(
    theirs: PreTrainedModel,
    ours: Pretrained,
    source: Tensor,
    keep: Tensor | None,
    cache: str,
    *,
    start: int,
    eos: int,
    pad: int,
) -> None:
    """Greedily by an encoder-decoder, ours without a cache ("no"), a "grown" or a "fixed" one.

    No token twice in a row of the batch: a random model would repeat its first one for ever.
    """
    expected = theirs.generate(
        source,
        attention_mask=torch.ones_like(source) if keep is None else keep.long(),
        generation_config=GenerationConfig(
            max_new_tokens=12,
            do_sample=False,
            no_repeat_ngram_size=1,
            use_cache=False,  # theirs has as many layers as the encoder, which may be too few
            pad_token_id=pad,
            eos_token_id=eos,
            decoder_start_token_id=start,
        ),
    )
    memory = ours.encode(source, keep)
    caches = None if cache == "no" else ours.new_caches(None if cache == "grown" else 12)
    got = greedy(
        lambda new, _: ours.decode(new, memory, keep, caches),
        torch.full((len(source), 1), start),
        12,
        eos=eos,
        pad=pad,
        cached=cache != "no",
    )
    assert torch.equal(got, expected)


@torch.no_grad()
def check_causality(model: Pretrained, source: Tensor, target: Tensor, keep: Tensor) -> None:
    """No position of an encoder-decoder sees a later target, and each sees its own."""
    before = model(source, target, keep)
    for t in range(1, target.shape[1]):
        changed = target.clone()
        changed[:, t] = changed[:, t] % (model.config.vocab_size - 1) + 1
        after = model(source, changed, keep)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@torch.no_grad()
def check_cached(
    model: Pretrained,
    source: Tensor,
    target: Tensor,
    keep: Tensor,
    sizes: list[int],
    capacity: int | None,
) -> None:
    """An encoder-decoder writes the same in parts of these sizes as at once."""
    memory, caches = model.encode(source, keep), model.new_caches(capacity)
    parts = [model.decode(part, memory, keep, caches) for part in target.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(source, target, keep))
    lengths = (target.shape[1], source.shape[1])
    assert [(len(own), len(cross)) for own, cross in caches] == [lengths] * len(model.decoder)


def check_vectors(
    theirs: PreTrainedModel, ours: Pretrained, source: Tensor, target: Tensor, keep: Tensor
) -> None:
    """An encoder-decoder reads vectors as well as tokens, also such as no token has.

    In training, so that what is dropped agrees, and back to the vectors.
    """
    with torch.no_grad():
        memory = ours.encoder_hidden(ours.embed(source), keep)
        assert torch.equal(memory, ours.encode(source, keep))
        states = ours.decoder_hidden(ours.embed(target), memory, keep)
        assert torch.equal(ours.logits(states), ours(source, target, keep))
    prompt = torch.randn(len(source), 4, ours.config.d_model)
    keep = torch.cat((torch.ones(len(source), 4, dtype=torch.bool), keep), dim=1)
    results = []
    for model in (ours.train(), theirs.train()):
        x = prompt.clone().requires_grad_()
        table = model.get_input_embeddings() if model is theirs else model.embed
        read, written = torch.cat((x, table(source)), dim=1), table(target)
        written.retain_grad()
        torch.manual_seed(1)
        if model is theirs:
            arguments = {"inputs_embeds": read, "decoder_inputs_embeds": written}
            logits = theirs(**arguments, attention_mask=keep.long()).logits
        else:
            memory = ours.encoder_hidden(read, keep)
            logits = ours.logits(ours.decoder_hidden(written, memory, keep))
        logits.square().mean().backward()
        assert x.grad.abs().amax(dim=(0, 2)).min() > 0
        results.append((logits, x.grad, written.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def check_round_trips(theirs: PreTrainedModel, ours: type[Pretrained]) -> None:
    """Theirs to ours to theirs to ours: nothing is lost, not a bit."""
    with tempfile.TemporaryDirectory() as folder:
        first, second, third = (Path(folder) / name for name in ("first", "second", "third"))
        theirs.save_pretrained(first)
        model = ours.from_pretrained(first)
        model.save_pretrained(second)
        again, report = type(theirs).from_pretrained(second, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        check_same(again.state_dict(), theirs.state_dict())
        again.save_pretrained(third)
        once_more = ours.from_pretrained(third)
        check_same(once_more.state_dict(), model.state_dict())
        assert once_more.config == model.config


def check_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def count(build: Callable[[], nn.Module]) -> int:
    """Parameters of a model that is too large to be made: on the meta device, without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def greedy(
    step: Callable[[Tensor, int], Tensor],
    tokens: Tensor,
    n: int,
    *,
    eos: int,
    pad: int,
    cached: bool,
) -> Tensor:
    """Append up to n tokens, of each row none twice, until every row has written `eos`.

    `step` gets the tokens that are new to it and how many came before them, and gives the logits.
    """
    over = torch.zeros(len(tokens), dtype=torch.bool)
    past = 0
    for _ in range(n):
        scores = step(tokens[:, past:], past)[:, -1].scatter(1, tokens, -torch.inf)
        best = torch.where(over, pad, scores.argmax(dim=-1))
        past = tokens.shape[1] if cached else 0
        tokens = torch.cat((tokens, best[:, None]), dim=1)
        over |= best == eos
        if over.all():
            break
    return tokens
