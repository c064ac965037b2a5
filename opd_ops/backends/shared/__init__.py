"""What the streamed and the Triton backend both stand on."""
