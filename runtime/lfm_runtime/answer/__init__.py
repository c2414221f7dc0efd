"""One answer: what it is made from, its text, given answers and how likely they are."""
