"""Speech translation and recognition: an encoder-decoder writes the text of an utterance."""
