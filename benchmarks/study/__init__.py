"""The study of selectors."""
