"""The backends, and which one a call uses."""
