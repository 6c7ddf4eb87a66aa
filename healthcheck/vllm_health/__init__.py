"""The prober: checks the health of a vLLM server. Imports nothing of the launcher."""
