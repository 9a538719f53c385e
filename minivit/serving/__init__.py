"""Serving: a model behind HTTP, whose concurrent requests are computed in batches."""
