"""Requests, scheduling, sampling, the rank's step runner, and the engine that holds the truth."""
