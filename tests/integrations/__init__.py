"""Real runs of other people's trainers with this loss inside, on models of a few thousand weights.

Not here: the loss (tests/loss/test_loss.py), the peers' own losses (tests/parity).
"""
