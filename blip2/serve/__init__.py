"""HTTP: OpenAI's API, endpoints of the package's own and a page, on an engine that batches all clients' requests."""
