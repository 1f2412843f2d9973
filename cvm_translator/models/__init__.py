"""The translation model: its maths, decoding, first weights, sizes and files."""
