"""The course's figures: static ones with alt text, and interactive ones that need no kernel.

Every figure says in words what it shows, refuses numbers that cannot be what they claim to be (a
row of attention that does not sum to 1, a NaN), and is drawn from tensors that tested code made.
"""

from llm_anatomy.figures.blocks import Figure, frames, grid_of_frames
from llm_anatomy.figures.explorers import (
    attention_explorer,
    depth_explorer,
    heads_viewer,
    mask_gallery,
    position_similarity,
    softmax_temperature,
)
from llm_anatomy.figures.live import mask_painter
from llm_anatomy.figures.peft import method_comparison, peft_calculator, rank_explorer
from llm_anatomy.figures.static import canvas, heat_map, line_plot, mask_pictures, show

__all__ = [
    "Figure",
    "attention_explorer",
    "canvas",
    "depth_explorer",
    "frames",
    "grid_of_frames",
    "heads_viewer",
    "heat_map",
    "line_plot",
    "mask_gallery",
    "mask_painter",
    "mask_pictures",
    "method_comparison",
    "peft_calculator",
    "position_similarity",
    "rank_explorer",
    "show",
    "softmax_temperature",
]
