"""A question about every image of a folder: records in a JSONL file, one for each image, whole whatever happens."""
