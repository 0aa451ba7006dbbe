"""The student, frozen models, the table of weights, and the loss that they meet in."""
