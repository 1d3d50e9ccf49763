"""A model as a service: an engine that answers many at once, an HTTP API and a page on top of it."""
