"""Qwen and the prompt it makes of a task's demonstrations."""
