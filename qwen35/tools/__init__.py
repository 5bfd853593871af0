"""Commands around a run: models from a hub, the tiny recipe's model and data, the doctor."""
