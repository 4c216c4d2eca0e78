"""Sweeps: a search for good settings, read from a sweep file of Weights & Biases, over a study of Optuna's."""
