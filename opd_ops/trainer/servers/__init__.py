"""Clients that use HTTP: a teacher and a sampler on a server."""
