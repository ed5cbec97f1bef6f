import os

# Before anything imports huggingface_hub, which reads it once: TRL reports each trainer that is made.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
