"""Reference implementations of the language-model architectures that the course takes apart.

Nothing is re-exported here, so that an import shows where an idea lives:
`from llm_anatomy.attention import MultiHeadAttention`.
"""

__version__ = "0.1.0"
