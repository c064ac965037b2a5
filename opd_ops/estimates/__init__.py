"""What a call will cost, before it is made."""
