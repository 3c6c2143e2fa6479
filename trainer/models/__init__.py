"""The trained language model, its reference, and the models of rewards and evaluation."""
