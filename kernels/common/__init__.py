"""Shared by all operators: the declaration, checks of arguments, facts about tracing and launches."""
