"""vLLM engine: generate responses in this process or on a vLLM server."""
