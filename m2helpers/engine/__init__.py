"""What the notebooks never open: attention, activations, losses, the cache, saving, tracking and the training loop."""
