"""Experiments with the trainer, each a folder with its recipe, its measurements and its page."""
