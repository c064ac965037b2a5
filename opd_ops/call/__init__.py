"""A call from its arguments to its result, in reading order: prepare, score, choose, reduce."""
