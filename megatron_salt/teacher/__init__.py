"""The frozen teacher of a run: its passes, its plan, its place in the step."""
