"""A small invented world whose text is generated, so that the truth about it is known exactly.

`grammar` computes with probabilities of text, `words` lists what can be said, `stories` are the
corpus for language models; `labels`, `pairs`, `text_to_text` and `in_context` are data for what is
learned on top. Nothing is stored: the same seed gives the same text on every machine.
"""
