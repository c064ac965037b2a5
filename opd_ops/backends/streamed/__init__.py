"""The streamed backend: any device, in bounded memory."""
