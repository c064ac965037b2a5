"""From statistics to scores, from scores to the selected positions."""
