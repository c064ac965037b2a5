"""Estimates of the cost of a call, before it is made."""
