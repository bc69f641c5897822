"""Measures what only a GPU can show, in parts that each have their own process and time limit (`make gpu`)."""
