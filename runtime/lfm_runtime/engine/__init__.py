"""The only place with an InferenceSession: how graphs run here, plain or prepared, on a CPU or a GPU."""
