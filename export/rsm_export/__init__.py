"""Export: a checkpoint becomes one static graph in a bundle that acts the same."""
