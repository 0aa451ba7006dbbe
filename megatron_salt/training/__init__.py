"""The run: objects, the loop over steps, the engine, saving and resuming."""
