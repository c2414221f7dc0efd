"""int8 and int4 variants of a bundle. Empty until the first method lands; the name and its import rules are fixed."""
