"""A served teacher and served rollouts against vLLM itself: `make test-vllm`, in no other stage (tests/conftest.py).

Not here: the same clients against a stand-in (tests/trainer/servers/).
"""
