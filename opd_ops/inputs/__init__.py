"""What a caller may pass: logits and heads, lists of log-probabilities, rollout statistics, positions, shared vocabularies."""
