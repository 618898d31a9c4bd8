"""The OpenAI-compatible HTTP API over a `Service`."""
