"""The Ray backend, an extra: steps as tasks of a cluster, trainings through Ray Train, generation shared among nodes."""
