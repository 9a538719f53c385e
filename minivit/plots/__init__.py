"""Plots of runs and models. Each function returns a Matplotlib figure, rendered in memory; Matplotlib is imported on first use.

curves      learning curves, accuracy against cost, exit histograms, curves of several runs
judgement   confusion matrices, reliability diagrams
images      sheets of images that leave a cascade early and late
attention   attention probabilities, maps and rollout, overlaid on images
weights     similarity of position embeddings, patch filters, token-mixing weights
run         `draw_run`: all plots that apply to a run
"""

from .attention import attention_maps, attention_probabilities, attention_rollout, rollout_maps
from .curves import accuracy_cost_curve, compared_curves, exit_histogram, learning_curves, save_learning_curves
from .figure import save_figure
from .images import exit_sheet
from .judgement import confusion_picture, reliability_diagram
from .run import draw_run
from .weights import patch_filters, position_similarity, token_mixing_maps

__all__ = [
    "accuracy_cost_curve",
    "attention_maps",
    "attention_probabilities",
    "attention_rollout",
    "compared_curves",
    "confusion_picture",
    "draw_run",
    "exit_histogram",
    "exit_sheet",
    "learning_curves",
    "patch_filters",
    "position_similarity",
    "reliability_diagram",
    "rollout_maps",
    "save_figure",
    "save_learning_curves",
    "token_mixing_maps",
]
