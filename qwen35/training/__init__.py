"""What a training step needs beside the model: loss, optimizer, metrics, validation, and what a run goes on from."""
