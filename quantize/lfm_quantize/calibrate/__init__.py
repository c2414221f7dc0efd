"""What calibration images put through the graphs: questions, answers to follow, blocks, what products are fed."""
