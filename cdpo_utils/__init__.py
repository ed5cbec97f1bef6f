import os

# Before anything imports huggingface_hub, which reads it once: TRL reports each trainer that is made.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# vLLM reports each engine that begins, unless one of these says no; other libraries read the second, too.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

__version__ = "0.1.0"
