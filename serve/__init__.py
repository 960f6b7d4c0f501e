"""The OpenAI-compatible HTTP front: protocol, limits, metrics, and the page that shows what goes on."""
