"""Which tensors a sample holds, by the configuration alone: what the model's and the data's side agree on. Without torch.

Shape letters: s = model.seq_length, t = model.target_length.
"""

from megadsl.config import Config


def batch_keys(config: Config) -> tuple[str, ...]:
    """Names of the tensors of a sample, in order; what the first entry of the model reads comes first.

    decoder and encoder: tokens, labels, loss_mask [s]; segments [s] where documents are kept apart (1, 2, ...; 0: padding);
    prefix_length []; tokentypes [s]; sentence_order [] (1: swapped).
    encoder_decoder: source_tokens [s], target_tokens, labels, loss_mask [t]; source_segments [s] where sources are padded.
    loss_mask is float32, all others are int64.
    """
    data, model = config.data, config.model
    if model.family == "encoder_decoder":
        padded = ("source_segments",) if data.denoising == "infilling" else ()
        return ("source_tokens", "target_tokens", "labels", "loss_mask", *padded)
    optional = {
        "segments": data.reset_attention_mask or data.reset_position_ids,
        "prefix_length": data.prefix_lm,
        "tokentypes": model.family == "encoder" and model.num_tokentypes > 0,
        "sentence_order": data.sentence_order,
    }
    return ("tokens", "labels", "loss_mask", *(key for key, given in optional.items() if given))
