"""What steps the weights: DeepSpeed (imported nowhere else) or plain torch behind one interface; optimizers."""
