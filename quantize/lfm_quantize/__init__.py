"""int8, int4 and fp16 variants of a bundle, calibrated with images and judged on others. Begin with quantize.py."""
