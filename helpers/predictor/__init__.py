"""The server of a prediction container: `python -m helpers.predictor`, under Vertex AI's prediction contract."""
