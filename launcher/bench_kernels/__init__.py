"""What `phalanx bench kernels` measures: each operator in the shapes of a model, beside PyTorch and the roofline."""
