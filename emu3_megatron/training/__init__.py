"""Configuration, the trainer, optimizer and schedules, checkpoints, callbacks and metrics."""
