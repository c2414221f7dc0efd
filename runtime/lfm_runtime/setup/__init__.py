"""How a run will be made, decided before anything is loaded."""
