"""What speaks HTTP: a teacher and a sampler behind a server."""
