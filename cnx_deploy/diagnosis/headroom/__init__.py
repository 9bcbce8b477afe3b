"""How far a network's tensors, statistics and weights are from the limits of FP16."""
