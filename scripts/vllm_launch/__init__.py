"""Plans, runs, watches and drains vLLM's OpenAI server."""
