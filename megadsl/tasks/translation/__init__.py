"""Translation of text: an encoder-decoder writes the sentence of another language."""
