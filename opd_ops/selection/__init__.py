"""Statistics to scores, scores to the selected positions."""
