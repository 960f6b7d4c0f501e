"""Measuring a server over HTTP: requests that arrive at random, and the rate at which they become too many."""
