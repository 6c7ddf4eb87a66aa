"""Asks whether vLLM is well; knows nothing of the launcher."""
