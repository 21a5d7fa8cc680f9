"""Language modelling: the next token (decoder), masked tokens (encoder), spans of text (encoder_decoder)."""
