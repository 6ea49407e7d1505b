"""Model layers besides attention: rotary positions, the loss, and scores of predictions."""
