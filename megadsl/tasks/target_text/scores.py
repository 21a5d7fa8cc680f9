"""Scores of written texts by kept libraries: BLEU and chrF of sacrebleu with their signatures, word and character error of jiwer."""

from collections.abc import Sequence

from megadsl.errors import UserError


def scores_of(kind: str, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """`kind` translation: bleu, chrf (0 to 100) and the signature of BLEU; recognition: wer and cer (errors per word, character)."""
    return translation_scores(hypotheses, references) if kind == "translation" else recognition_scores(hypotheses, references)


def translation_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UserError("BLEU needs the package sacrebleu: pip install 'megadsl[speech]'.") from error
    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(list(hypotheses), [list(references)]).score,
        "chrf": chrf.corpus_score(list(hypotheses), [list(references)]).score,
        "bleu_signature": str(bleu.get_signature()), "chrf_signature": str(chrf.get_signature()),
    }


def recognition_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """Texts are lower-cased and freed of punctuation first, as word error rates usually are."""
    try:
        import jiwer
    except ImportError as error:
        raise UserError("Word error rate needs the package jiwer: pip install 'megadsl[speech]'.") from error
    plain = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()])
    pairs = [(reference, hypothesis) for reference, hypothesis in zip(plain(list(references)), plain(list(hypotheses)), strict=True) if reference]
    if not pairs:
        raise UserError("No reference has a word, so there is no word error rate; give other texts.")
    kept, written = zip(*pairs, strict=True)
    return {"wer": jiwer.wer(list(kept), list(written)), "cer": jiwer.cer(list(kept), list(written))}
