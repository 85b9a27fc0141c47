"""The Hugging Face format: names, shapes and files, in both directions."""
