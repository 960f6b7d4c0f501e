"""Configuration, placement, formations of ranks on Ray or plain processes, and the command line."""
