"""What tasks share whose model writes a text: rows of TSV files, the order of training, batches, loss, beam search scores."""
