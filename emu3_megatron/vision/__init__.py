"""The vision tokenizer: model, losses, training, checkpoints and reconstruction metrics."""
