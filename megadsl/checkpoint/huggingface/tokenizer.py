"""A SentencePiece model as tokenizer.json (the fast tokenizers of Hugging Face), with the same ids for every text.

The pieces are written with plain spaces instead of U+2581. So no normaliser is needed, and a real U+2581 in a text falls back to
bytes, as it does in megadsl.data.tokenizer. transformers' own converter would read U+2581 as a space, "<mask>" in a text as the
control piece and "<0x41>" as a byte.
"""

import json
import shutil
from pathlib import Path

from megadsl.data.tokenizer import Tokenizer

_SPACE_SYMBOL = "\u2581"


def write_tokenizer(tokenizer: Tokenizer, model_file: Path, folder: Path) -> str | None:
    """tokenizer.model, and tokenizer.json and tokenizer_config.json beside it; the reason, where the latter two are left out."""
    from sentencepiece import sentencepiece_model_pb2

    shutil.copyfile(model_file, folder / "tokenizer.model")
    model = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    reason = _refusal(model)
    if reason:
        return reason
    special = {f"{name}_token": tokenizer.pieces([index])[0] for name, index in tokenizer.special_ids.items()}
    special["unk_token"] = tokenizer.pieces([tokenizer.unk])[0]
    (folder / "tokenizer.json").write_text(json.dumps(_fast(model, tokenizer), ensure_ascii=False, indent=1), encoding="utf-8")
    settings = {
        # split_special_tokens: "<mask>" in a text is six characters, as for megadsl; switch it off to write control pieces in texts.
        "tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "clean_up_tokenization_spaces": False, **special,
        "additional_special_tokens": tokenizer.pieces(tokenizer.additional_special_tokens_ids), "model_max_length": int(1e30),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return None


def _refusal(model) -> str | None:
    normal, trainer = model.normalizer_spec, model.trainer_spec
    if trainer.model_type != trainer.BPE:
        # Measured: of 400 files 1 in 5 has such a tie ("######" as ### ### or # ## ###), which no tokenizer.json decides likewise.
        return "SentencePiece breaks ties between equally likely unigram segmentations by the rounding of float32 sums"
    if normal.name != "identity" or normal.add_dummy_prefix or normal.remove_extra_whitespaces or not trainer.byte_fallback:
        return "the SentencePiece model normalises its text or has no byte fallback, unlike those of megadsl tokenizer train"
    if any(len(piece.piece) != 1 for piece in model.pieces if piece.type == piece.USER_DEFINED):
        return "the SentencePiece model has user-defined pieces of several characters, unlike those of megadsl tokenizer train"
    return None


def _fast(model, tokenizer: Tokenizer) -> dict:
    pieces = [piece.piece.replace(_SPACE_SYMBOL, " ") for piece in model.pieces]
    scores = {text: piece.score for text, piece in zip(pieces, model.pieces, strict=True) if piece.type == piece.NORMAL}
    controls = [index for index, piece in enumerate(model.pieces) if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    whole = "".join(rf"\x{{{ord(piece.piece):x}}}" for piece in model.pieces if piece.type == piece.USER_DEFINED)
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": index, "content": pieces[index], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for index in controls],
        # SentencePiece never joins user-defined pieces (line end, tab) with others.
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": f"[{whole}]"}, "behavior": "Isolated", "invert": False} if whole else None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": pieces[tokenizer.unk], "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": _merges(scores),
        },
    }


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to put a piece together from two, best piece first, as SentencePiece takes them.

    Of the ways to make one piece SentencePiece takes the leftmost pair in the text. Only in runs such as spaces can two of them
    overlap, and there the longer part stands left.
    """
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        splits = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
        merges += [(left, right) for left, right in splits if left in scores and right in scores]
    return merges
