"""Data, losses and training runs."""
