"""The quality gate: a variant against another, on images calibration never saw."""
