"""What a training step needs beside the model: loss, optimizer, metrics, validation, resuming."""
