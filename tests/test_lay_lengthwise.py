"""Another order in memory changes nothing but the time that decoding takes."""

import torch

from llm_anatomy.decoding import Cached, generate, lay_lengthwise
from llm_anatomy.models.gpt2 import GPT2, GPT2Config


def test_laid_lengthwise_nothing_changes_but_the_order_in_memory(tmp_path):
    torch.manual_seed(0)
    ours = GPT2(GPT2Config(vocab_size=13, n_layers=2, n_heads=2, d_model=8, d_ff=32)).eval()
    readers = (Cached(lambda t, c: ours(t, caches=c), ours.new_caches(9)) for _ in range(2))
    prompt = torch.tensor([[1, 2, 3], [4, 6, 8]])
    before = {name: p.clone() for name, p in ours.named_parameters()}
    expected, text = ours(prompt), generate(next(readers), prompt, 6)
    lay_lengthwise(ours)
    shapes = set()
    for name, p in ours.named_parameters():
        assert torch.equal(p, before[name])
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
        if p.ndim == 2:
            assert p.stride()[p.shape[1] > p.shape[0]] == 1, name
            shapes.add(p.shape[1] > p.shape[0])
    assert shapes == {True, False}
    torch.testing.assert_close(ours(prompt), expected)
    assert torch.equal(generate(next(readers), prompt, 6), text)
    ours.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    lay_lengthwise(ours)  # again
    ours(prompt).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
