"""Text in, clean and split pairs of sentences out: readers, cleaning, splits, tokenizer and data sets."""
