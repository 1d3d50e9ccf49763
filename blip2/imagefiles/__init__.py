"""Image files: which they are, what costs too much, decoding them. No torch here, so that a process begins quickly."""
