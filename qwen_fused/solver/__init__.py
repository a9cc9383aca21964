"""Answers to tasks: prediction and evaluation."""
