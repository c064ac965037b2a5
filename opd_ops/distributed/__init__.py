"""What several processes compute together: collectives, order statistics."""
