"""The reference trainer on tiny models made here (tests/integrations/models.py), one file per part of it.

Not here: the loss (tests/loss/test_loss.py and its neighbours), servers (servers/).
"""
