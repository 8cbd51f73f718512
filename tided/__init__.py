"""tided: an asyncio control plane that makes LLM inference engines faster while they serve."""

__version__ = "0.1.0"
