"""The inputs of a call: logits and heads, lists of log-probabilities, rollout statistics, positions, shared vocabularies."""
