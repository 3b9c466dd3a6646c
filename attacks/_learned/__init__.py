"""An inverter learned from simulated clients: the client with its defenses, pairs of update and records, and the estimator."""
