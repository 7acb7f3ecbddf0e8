"""Hugging Face: directories of a configuration and safetensors."""
