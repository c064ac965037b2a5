"""Computations of several processes together: collectives, order statistics."""
