"""Held-out losses of students, teachers and checkpoints."""
