"""Which weights matter: scores of every weight from gradients at the frozen base, for a part of the model at a time."""
