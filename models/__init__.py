"""Networks in torch, their checkpoints and their training."""
