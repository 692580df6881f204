"""The sources' claims on logits, decoding and repetition, executed. The ledger is claims.yml.

Where it can be, the model is a Markov chain, so that it is perfect: whatever goes wrong then is the
fault of decoding, or of the data, and not of training.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.generation import logits_process

from llm_anatomy import decoding
from tests.claims import tiny

V = 12


def chain(seed: int = 0, scale: float = 2.0) -> Tensor:
    """Logits (V, V) of a Markov chain: those of the next token, given the last."""
    return scale * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))


def write(
    table: Tensor, n_new: int, prompt: int = 0, seed: int | None = None, filters: tuple = ()
) -> list[int]:
    """Greedy text of a chain, or sampled with a seed."""
    pick = decoding.greedy if seed is None else decoding.sample(torch.Generator().manual_seed(seed))
    reader = decoding.Rereading(lambda tokens: table[tokens])
    return decoding.generate(reader, torch.tensor([[prompt]]), n_new, pick=pick, filters=filters)[
        0
    ].tolist()


def cycle(text: list[int]) -> tuple[int, ...]:
    """The tokens between the last one and its previous occurrence: the loop that a text ends in."""
    last = len(text) - 1 - text[-2::-1].index(text[-1]) - 1
    return tuple(text[last + 1 :])


def distinct(text: list[int], n: int) -> float:
    """Share of the n-grams of a text that are different from each other."""
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams)


def entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


def stationary(table: Tensor) -> Tensor:
    """How often each token occurs in a long sampled text."""
    p = table.double().softmax(dim=-1)
    return torch.linalg.matrix_power(p, 500)[0]


def gpt2() -> transformers.GPT2LMHeadModel:
    return tiny.randomise(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.kwargs_gpt2()))
    )


# --- logits ---------------------------------------------------------------------------------------


def test_the_last_layer_scores_every_token_of_the_vocabulary() -> None:
    """C336: one logit for each token, made by the LM head, which in GPT-2 is the embedding."""
    model = gpt2()
    assert model(tiny.tokens()).logits.shape[-1] == model.config.vocab_size
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_logit_is_no_probability() -> None:
    """C337, C352: logits are negative, exceed one, and are the same after any shift."""
    with torch.no_grad():
        logits = gpt2()(tiny.tokens()).logits.double()
    assert (logits < 0).any() and (logits > 1).any()
    torch.testing.assert_close((logits + 7).softmax(dim=-1), logits.softmax(dim=-1))
    # A log-probability up to a constant; its exponential is the unnormalised probability.
    log_p = logits.log_softmax(dim=-1)
    constant = logits - log_p
    torch.testing.assert_close(constant, constant[..., :1].expand_as(constant))
    p = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(p, logits.softmax(dim=-1))
    wrong = logits / logits.sum(dim=-1, keepdim=True)
    assert (wrong < 0).any()  # what normalising a "raw probability" would give


def test_softmax_gives_a_distribution_for_every_prefix() -> None:
    """C338: positive, sums to one, and depends on the text so far alone."""
    ids = tiny.tokens()
    with torch.no_grad():
        model = gpt2().double()
        p = model(ids).logits.softmax(dim=-1)
        q = model(tiny.changed(ids, ids.shape[1] - 1)).logits.softmax(dim=-1)
    assert (p > 0).all()
    torch.testing.assert_close(p.sum(dim=-1), torch.ones_like(p[..., 0]))
    torch.testing.assert_close(p[:, :-1], q[:, :-1])
    assert not torch.allclose(p[:, -1], q[:, -1])


def test_the_logit_function_is_the_inverse_of_the_logistic() -> None:
    """C350: ln(p / (1 - p)) maps (0, 1) onto the whole line and back."""
    x = torch.linspace(-9, 9, 37, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(x.sigmoid()), x)
    p = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(torch.logit(p), (p / (1 - p)).log())
    assert torch.logit(torch.tensor([0.0, 1.0])).tolist() == [-math.inf, math.inf]


def test_raw_outputs_before_the_softmax_generalise_the_logit() -> None:
    """C351: for two classes the softmax is the logistic function of the difference of outputs."""
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = z.softmax(dim=-1)[:, 1]
    torch.testing.assert_close(p, (z[:, 1] - z[:, 0]).sigmoid())
    torch.testing.assert_close(torch.logit(p), z[:, 1] - z[:, 0])


# --- choosing -------------------------------------------------------------------------------------


def test_a_decoder_writes_a_sequence_by_predicting_one_token_after_another() -> None:
    """C070: each new token is the prediction for the text before it, the new ones included."""
    model = gpt2()
    prompt = tiny.tokens(length=3)
    reader = decoding.Rereading(lambda tokens: model(tokens).logits)
    text = decoding.generate(reader, prompt, 6)
    with torch.inference_mode():
        predicted = model(text).logits.argmax(dim=-1)
    assert torch.equal(predicted[:, 2:-1], text[:, 3:])


def test_temperature_sharpens_or_flattens_and_keeps_the_order() -> None:
    """C096, C169: entropy rises with tau from 0 to log V; the ranking of the tokens stays."""
    z = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    taus = (0.01, 0.3, 0.6, 1.0, 2.0, 1000.0)
    cooled = [decoding.temperature(tau)(z, z) for tau in taus]
    entropies = [entropy(c).item() for c in cooled]
    assert entropies == sorted(entropies) and len(set(entropies)) == len(taus)
    assert entropies[0] < 1e-3
    assert entropies[-1] == pytest.approx(math.log(50), abs=1e-3)
    for c in cooled:
        assert torch.equal(c.argsort(), z.argsort())
    theirs = logits_process.TemperatureLogitsWarper(0.6)(None, z)
    torch.testing.assert_close(theirs, cooled[2])


def test_temperature_zero_is_refused_and_greedy_ignores_the_temperature() -> None:
    """C169: tau = 0 is no temperature, and tau changes a text only where it is sampled."""
    with pytest.raises(ValueError, match="strictly positive"):
        logits_process.TemperatureLogitsWarper(0.0)
    table = chain()
    cold, hot = (decoding.temperature(tau) for tau in (0.3, 3.0))
    assert write(table, 20, filters=(cold,)) == write(table, 20, filters=(hot,))
    assert write(table, 20, seed=0, filters=(cold,)) != write(table, 20, seed=0, filters=(hot,))


def test_max_tokens_is_a_limit_not_a_length() -> None:
    """C096: a text may end before it has the largest number of new tokens."""
    table = torch.zeros(3, 3)
    table[0, 1] = table[1, 2] = 5.0  # 0, then 1, then the end
    reader = decoding.Rereading(lambda tokens: table[tokens])
    text = decoding.generate(reader, torch.tensor([[0]]), 100, end_id=2)
    assert text.tolist() == [[0, 1, 2]]


def test_the_likeliest_token_or_a_drawn_one() -> None:
    """C339, C171: greedy gives one text however often it is asked; sampling gives many."""
    table = chain()
    assert len({tuple(write(table, 20)) for _ in range(5)}) == 1
    assert len({tuple(write(table, 20, seed=seed)) for seed in range(5)}) == 5


def test_the_same_text_twice_is_not_a_text_that_repeats_itself() -> None:
    """C171: a chain that counts up writes one text for ever, and nothing in it occurs twice."""
    n = 30
    table = torch.full((n, n), -20.0)
    table[torch.arange(n - 1), torch.arange(1, n)] = 20.0
    texts = {tuple(write(table, n - 1, seed=seed)) for seed in range(5)}
    assert len(texts) == 1
    assert distinct(list(texts.pop()), 1) == 1.0


# --- repetition: what it is -----------------------------------------------------------------------


def test_greedy_loops_of_one_token_and_of_several() -> None:
    """C170: both kinds occur, a single token for ever and a longer phrase for ever.

    Greedy search on a chain of V tokens must repeat a token within V steps, and from then on
    everything.
    """
    lengths = set()
    for seed in range(20):
        text = write(chain(seed), 3 * V)
        loop = cycle(text)
        lengths.add(len(loop))
        assert text[-2 * len(loop) :] == 2 * list(loop)
    assert 1 in lengths and max(lengths) >= 3


def test_loops_swallow_prompts_and_carry_little_information() -> None:
    """C172: greedy texts of many prompts end in few loops, which hold no surprise."""
    for seed in range(10):
        table = chain(seed)
        loops = {frozenset(cycle(write(table, 3 * V, prompt=prompt))) for prompt in range(V)}
        assert len(loops) <= V // 2
        longest = max(len(loop) for loop in loops)
        # Rates in nats a token: a loop is certain, sampled text has the chain's entropy rate.
        rate = (stationary(table) * entropy(table.double())).sum().item()
        assert rate > 0.3
        tail = write(table, 5 * V)[2 * V :]
        followers = {a: {y for x, y in itertools.pairwise(tail) if x == a} for a in tail[:-1]}
        assert all(len(after) == 1 for after in followers.values())
        assert len(set(tail)) <= longest


# --- repetition: what causes it -------------------------------------------------------------------


def counted(corpus: list[str]) -> dict[str, dict[str, float]]:
    """Next-word probabilities after two words that make a corpus most likely: its counts."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for line in corpus:
        words = ["^", "^", *line.split(), "$"]
        for a, b, c in zip(words, words[1:], words[2:], strict=False):
            row = counts.setdefault((a, b), {})
            row[c] = row.get(c, 0) + 1
    return {
        context: {word: n / sum(row.values()) for word, n in row.items()}
        for context, row in counts.items()
    }


def likelihood(model: dict, line: str) -> float:
    words = ["^", "^", *line.split(), "$"]
    return math.prod(model[a, b][c] for a, b, c in zip(words, words[1:], words[2:], strict=False))


def greedy_line(model: dict) -> str:
    words = ["^", "^"]
    while words[-1] != "$":
        after = model[words[-2], words[-1]]
        words.append(max(after, key=after.get))
    return " ".join(words[2:-1])


def test_what_the_data_repeat_the_model_repeats() -> None:
    """C173: copies of one line raise its probability, and greedy search then recites it."""
    corpus = [
        f"{a} {b} {c}" for a in ("i", "we", "you") for b in ("see", "hear") for c in ("it", "you")
    ]
    line = "you hear it"
    shares = []
    for copies in (0, 3, 30):
        model = counted(corpus + copies * [line])
        shares.append(likelihood(model, line))
        assert shares[-1] == pytest.approx((1 + copies) / (12 + copies), rel=0.35)
    assert shares == sorted(shares) and shares[-1] > 0.6
    assert greedy_line(counted(corpus + 30 * [line])) == line
    assert greedy_line(counted(corpus)) != line


def test_likelihood_training_alone_does_not_repeat_maximising_does() -> None:
    """C174: a perfect model, sampled, repeats as often as its data; maximised, it loops.

    The chain below never says a token twice in a row and its next token is nearly uniform.
    """
    table = 0.1 * chain()
    table.fill_diagonal_(-math.inf)
    sampled = write(table, 400, seed=0)
    assert all(a != b for a, b in itertools.pairwise(sampled))
    assert distinct(sampled[:40], 4) > 0.95
    assert distinct(write(table, 400), 4) < 0.05


def test_less_varied_data_make_a_less_varied_model_and_varied_data_do_not_save_greedy() -> None:
    """C175: the optimum of training has the entropy of the data, and greedy loops on both."""
    found = {}
    for name, scale in {"varied": 0.3, "monotonous": 6.0}.items():
        table = chain(scale=scale).double()
        data = (
            F.one_hot(
                torch.multinomial(
                    table.softmax(dim=-1),
                    20_000,
                    replacement=True,
                    generator=torch.Generator().manual_seed(0),
                ),
                V,
            )
            .double()
            .mean(dim=1)
        )  # (V, V): the relative counts, which are the optimum
        learnt = torch.special.entr(data).sum(dim=-1).mean()
        torch.testing.assert_close(learnt, entropy(table).mean(), rtol=0.05, atol=0.01)
        found[name] = learnt.item()
        assert distinct(write(table.float(), 300), 4) < 0.1
    assert found["varied"] > 4 * found["monotonous"]


def test_the_setting_that_matters_is_the_decoding() -> None:
    """C176, C165: one model, five ways to decode it; only maximising loops."""
    table = chain(3, scale=1.0)
    greedy = distinct(write(table, 60), 4)
    assert greedy < 0.2
    for name, filters in {
        "sampling": (),
        "top-p": (decoding.top_p(0.9),),
        "top-k": (decoding.top_k(6),),
    }.items():
        assert distinct(write(table, 60, seed=0, filters=filters), 4) > 2.5 * greedy, name
    banned = write(table, 60, filters=(decoding.no_repeat_ngram(3),))
    assert distinct(banned, 3) == 1.0
    # A penalty can merely move the loop: once every token has occurred, all are punished alike.
    punished = write(table, 300, filters=(decoding.repetition_penalty(1.3),))
    assert distinct(punished[150:], 4) < 0.2


def test_an_induction_head_copies_what_followed_the_same_token() -> None:
    """C177: [A][B] ... [A] gives B. It matches the current token, and copies the one after.

    The first layer writes into each position which token stood before it; the head compares that
    with the current token and copies the token itself.
    """
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        text = torch.randperm(V, generator=g)[:8]
        text = torch.cat((text, text[2:3]))  # the third token again
        now = F.one_hot(text, V).double()
        before = F.pad(now[:-1], (0, 0, 1, 0))
        scores = 30 * now[-1] @ before.T  # current token against each position's previous token
        weights = scores.softmax(dim=-1)
        copied = int((weights @ now).argmax())
        assert copied == text[3]  # what followed, not the token that matches
        assert int(weights.argmax()) == 3 and text[3] != text[-1]


def test_a_flat_distribution_repeats_least() -> None:
    """C178: the chance to draw a token that was drawn before is lowest where softmax is flat.

    Two independent draws agree with probability sum(p²), which is at least 1/V, with equality for
    the uniform distribution alone; and it falls as the temperature rises.
    """
    z = chain()[0].double()
    agree = [(z / tau).softmax(dim=-1).square().sum().item() for tau in (0.1, 0.5, 1, 3, 1000)]
    assert agree == sorted(agree, reverse=True)
    assert agree[-1] == pytest.approx(1 / V, rel=1e-4)
    assert agree[0] > 5 / V
    # And the share of old tokens follows: with V = 12 and 4 tokens used, a third of the mass.
    flat = torch.zeros(V).softmax(dim=-1)
    assert flat[:4].sum().item() == pytest.approx(4 / V)


def test_a_loop_feeds_itself_where_documents_differ_in_how_much_they_repeat() -> None:
    """C178: by Bayes, each repetition makes the next likelier, and the next token more certain."""
    repetitive, q, p = 0.1, 0.9, 1 / V  # share of such documents; chance to repeat in either kind
    chances = []
    for _ in range(5):
        chances.append(repetitive * q + (1 - repetitive) * p)
        repetitive = repetitive * q / chances[-1]
    assert all(a < b for a, b in itertools.pairwise(chances))
    assert chances[0] < 0.2 and chances[-1] > 0.8

    def of(c: float) -> float:  # entropy of the next token: repeat, or any other
        other = (1 - c) / (V - 1)
        return -c * math.log(c) - (V - 1) * other * math.log(other)

    assert of(chances[-1]) < of(chances[0])


def test_anisotropy_is_about_directions_not_about_repeats() -> None:
    """C181: states in a narrow cone, and outputs that stay the same, come apart both ways."""
    g = torch.Generator().manual_seed(0)

    def mean_cosine(x: Tensor) -> float:
        x = F.normalize(x, dim=-1)
        off = ~torch.eye(len(x), dtype=torch.bool)
        return (x @ x.T)[off].mean().item()

    spread = torch.randn(400, 64, generator=g)
    cone = spread + 5.0
    assert abs(mean_cosine(spread)) < 0.05 < 0.9 < mean_cosine(cone)
    # A head that ignores the common direction: anisotropic states with different outputs.
    head = torch.randn(64, V, generator=g)
    head = head - head.mean(dim=0)
    outputs = (cone @ head).softmax(dim=-1)
    torch.testing.assert_close(outputs, (spread @ head).softmax(dim=-1), rtol=1e-2, atol=1e-4)
    assert outputs.argmax(dim=-1).unique().numel() == V
    # And isotropic states with one and the same output.
    constant = (spread @ torch.zeros(64, V)).softmax(dim=-1)
    assert torch.equal(constant, constant[:1].expand_as(constant))


# --- against repetition ---------------------------------------------------------------------------


class Bag(nn.Module):
    """Logits from the set of all tokens so far: the least model that can learn not to repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(V))
        self.seen = nn.Parameter(torch.zeros(V, V))

    def forward(self, tokens: Tensor) -> Tensor:
        so_far = F.one_hot(tokens, V).cumsum(dim=1).clamp(max=1).float()  # (B, T, V)
        return self.bias + so_far @ self.seen


def trained(alpha: float) -> Bag:
    """Likelihood, and alpha times the unlikelihood of what the text holds already."""
    g = torch.Generator().manual_seed(0)
    zipf = 1 / torch.arange(1, V + 1)
    data = torch.multinomial(zipf.expand(200, V), 9, replacement=True, generator=g)
    inputs, targets = data[:, :-1], data[:, 1:]
    model = Bag()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    seen = F.one_hot(inputs, V).cumsum(dim=1).clamp(max=1)
    others = seen * (1 - F.one_hot(targets, V))
    for _ in range(150):
        p = model(inputs).softmax(dim=-1)
        likely = -p.gather(-1, targets[..., None]).log().mean()
        unlikely = -((1 - p).clamp(min=1e-6).log() * others).sum(dim=-1).mean()
        optimizer.zero_grad()
        (likely + alpha * unlikely).backward()
        optimizer.step()
    return model


def test_a_loss_against_repetition_works() -> None:
    """C168: unlikelihood training makes the greedy text of the same model repeat less."""
    found = []
    for alpha in (0.0, 6.0):
        model = trained(alpha)
        text = decoding.generate(decoding.Rereading(model), torch.tensor([[0]]), 7)
        found.append(distinct(text[0].tolist(), 1))
    assert found[0] <= 0.4 and found[1] >= 0.8


def test_a_low_rank_update_is_one_more_set_of_weights() -> None:
    """C167: with LoRA merged or not, a model writes the same texts; it decodes no other way."""
    torch.manual_seed(0)
    base, a, b = chain(), torch.randn(V, 2), torch.randn(2, V)

    def adapted(tokens: Tensor) -> Tensor:
        x = F.one_hot(tokens, V).float()
        return x @ base + (x @ a) @ b

    merged = base + a @ b
    text = decoding.generate(decoding.Rereading(adapted), torch.tensor([[0]]), 50)
    assert text[0].tolist() == write(merged, 50)
    assert distinct(text[0].tolist(), 4) < 0.3  # and greedy still loops
