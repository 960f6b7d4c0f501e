"""Compute operators: plain functions on plain tensors, each defined by its PyTorch reference."""
