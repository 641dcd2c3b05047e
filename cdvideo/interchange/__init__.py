"""Concepts and adapters in other people's files: read, told apart by their keys, and written."""
