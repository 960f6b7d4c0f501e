"""Measuring: the workloads that `phalanx bench` and the comparison with peers share."""
