"""Graph in, graph out: each pass states the pattern it matches and the cases it leaves alone, and says whether it
changed anything.
"""
