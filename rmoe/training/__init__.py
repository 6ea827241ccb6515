"""Training: `train(config, out)`, the trainer, checkpoints that survive anything, metrics."""
