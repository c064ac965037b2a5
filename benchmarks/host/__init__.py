"""Host time of one small call, under pytest-benchmark."""
