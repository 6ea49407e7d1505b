"""Parts of the model beside its attention: rotary positions and the loss."""
