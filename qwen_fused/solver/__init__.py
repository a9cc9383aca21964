"""Answers to tasks: a copy of the planner trained on a task's own demonstrations for some seconds, and its votes."""
