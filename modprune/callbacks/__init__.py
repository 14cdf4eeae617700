"""Pruning inside the trainers of others: `modprune.callbacks.lightning` and `modprune.callbacks.transformers`."""
