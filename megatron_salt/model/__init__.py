"""The student, the teacher, and the table of weights that both share."""
