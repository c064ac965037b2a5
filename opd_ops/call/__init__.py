"""The stages of a call, from its arguments to its result: prepare, score, choose, losses, reduce."""
