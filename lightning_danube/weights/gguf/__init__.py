"""GGUF files: header, tensors, tokenizer."""
