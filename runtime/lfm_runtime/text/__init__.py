"""Words to ids and back: the chat template, the tokenizer, the prompt."""
