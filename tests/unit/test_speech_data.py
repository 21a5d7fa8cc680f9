"""Utterances on disk -> a dataset: what is in it, and one sentence for whatever cannot be used."""


import numpy as np
import pytest
import soundfile
from speech_data import RATE, write_manifest

from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.tasks.speech.augment import SpecAugment
from megadsl.tasks.speech.features import filter_banks, normalised, waveform
from megadsl.tasks.speech.fillets import dialogs, fetch_fillets, missing_packages
from megadsl.tasks.speech.prepare import SpeechSettings, StoredSpeech, prepare_speech
from megadsl.tasks.target_text.order import BucketedOrder

SETTINGS = SpeechSettings(vocab_size=290, model_type="bpe")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("audio"), {"train": 20, "validation": 3, "test": 3})


def test_features_are_those_of_the_file_whatever_number_of_processes(manifest, tmp_path):
    made, reused = prepare_speech(manifest, tmp_path / "one", SETTINGS, workers=1)
    again, _ = prepare_speech(manifest, tmp_path / "two", SETTINGS, workers=2)
    assert not reused and made == again and {split: counts["examples"] for split, counts in made["splits"].items()} == {
        "train": 20, "validation": 3, "test": 3}
    assert prepare_speech(manifest, tmp_path / "one", SETTINGS, workers=1) == (made, True)
    stored = StoredSpeech(tmp_path / "one")
    assert stored.texts("test")[2]["id"] == "test-2"
    expected = normalised(filter_banks(waveform(manifest.parent / "test-2.ogg")))
    features = stored.features("test", 2)
    assert features.shape == expected.shape and np.abs(features - expected).max() < 0.01
    assert np.abs(features.astype(float).mean(axis=0)).max() < 0.01 and np.allclose(features.astype(float).std(axis=0), 1, atol=0.01)
    tokenizer = Tokenizer.load(tmp_path / "one" / "tokenizer.model")
    assert tokenizer.decode(stored.target("test", 2).tolist()) == stored.texts("test")[2]["tgt_text"]
    (tmp_path / "one" / "features.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="features.bin is missing or has not the [0-9]+ bytes"):
        StoredSpeech(tmp_path / "one")


def changed(manifest, tmp_path, **fields):
    """A copy of the manifest with other values in row 3."""
    lines = manifest.read_text().splitlines()
    columns, row = lines[0].split("\t"), lines[2].split("\t")
    row = [str(fields.get(column, manifest.parent / value if column == "audio" else value)) for column, value in zip(columns, row, strict=True)]
    others = ["\t".join(str(manifest.parent / part) if index == 1 else part for index, part in enumerate(line.split("\t"))) for line in lines[1:]]
    others[1] = "\t".join(row)
    (tmp_path / "changed.tsv").write_text("\n".join([lines[0], *others]) + "\n")
    return tmp_path / "changed.tsv"


@pytest.mark.parametrize("fields, sentence", [
    ({"audio": "nowhere.wav"}, "row 3 names an audio file that does not exist"),
    ({"tgt_text": ""}, "row 3 has an empty tgt_text"),
    ({"id": "train-0"}, "row 3 has no id of its own"),
    ({"split": "dove"}, "row 3 names an unknown split"),
    ({"audio": "nan.wav"}, "row 3 names audio whose samples are not finite"),
    ({"audio": "empty.wav"}, "row 3 names an audio file without samples"),
    ({"audio": "short.wav"}, "row 3 names an utterance that is too short"),
    ({"audio": "long.wav"}, "row 3 names an utterance that is too long"),
    ({"audio": "text.wav"}, "row 3 names a file that is no audio"),
])
def test_bad_rows_are_named_or_counted(manifest, tmp_path, fields, sentence):
    for name, samples in (("nan", np.full(RATE, np.nan)), ("empty", np.zeros(0)), ("short", np.ones(10)), ("long", np.ones(RATE * 40))):
        soundfile.write(tmp_path / f"{name}.wav", samples.astype(np.float32), RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no audio")
    table = changed(manifest, tmp_path, **fields)
    with pytest.raises(UserError, match=sentence) as error:
        prepare_speech(table, tmp_path / "data", SETTINGS, workers=1)
    assert str(table) in str(error.value) and "--skip-bad-rows" in str(error.value)
    made, _ = prepare_speech(table, tmp_path / "data", SETTINGS, workers=1, skip_bad_rows=True)
    assert made["splits"]["train"]["examples"] == 19 and sum(made["skipped_rows"].values()) == 1


def test_unknown_and_missing_columns(manifest, tmp_path):
    text = manifest.read_text()
    for wrong, sentence in (("tgt_txt", "has no column tgt_text"), ("tgt_text\tspeakr", "the column 'speakr' is not known; did you mean speaker")):
        (tmp_path / "m.tsv").write_text(text.replace("tgt_text", wrong, 1))
        with pytest.raises(UserError, match=sentence):
            prepare_speech(tmp_path / "m.tsv", tmp_path / "data", SETTINGS, workers=1)


def test_order_is_a_function_of_the_sample_number_with_similar_lengths_together():
    lengths = np.random.RandomState(0).randint(10, 500, 103)
    order, other = BucketedOrder(lengths, 5, 8, 4), BucketedOrder(lengths, 5, 8, 4)
    read = [order[index] for index in range(192)]
    assert [other[index] for index in reversed(range(192))] == read[::-1]
    epochs = read[:96], read[96:]
    assert all(len(set(epoch)) == 96 for epoch in epochs) and epochs[0] != epochs[1]

    def spans(indices):
        return np.mean([np.ptp(lengths[indices[start:start + 8]]) for start in range(0, len(indices), 8)])

    plain = BucketedOrder(lengths, 5, 8, 0)
    assert spans(read) < 0.5 * spans([plain[index] for index in range(192)])
    assert [BucketedOrder(lengths, 6, 8, 4)[index] for index in range(96)] != epochs[0]


def test_masks_are_decided_by_their_random_stream():
    frames = np.random.RandomState(1).standard_normal((200, 80)).astype(np.float32) + 3
    augment = SpecAugment(1, 27, 1, 100, 0.2)
    one, two, three = (augment(frames, np.random.RandomState(seed)) for seed in (1, 1, 2))
    assert (one == two).all() and (one != three).any()
    blank = one == 0
    assert blank.all(axis=1).sum() <= 40 and blank.all(axis=0).sum() <= 27 and (one[~blank] == frames[~blank]).all()
    assert (SpecAugment(0, 27, 0, 100, 1.0)(frames, np.random.RandomState(1)) == frames).all()


def test_texts_of_the_game():
    found = dialogs('dialogId("a", "font", "He said \\"no\\".")\ndialogStr("Řekl \\"ne\\".")\n\ndialogId("b", "font", "Only English")\n')
    assert found == [("a", 'He said "no".', 'Řekl "ne".'), ("b", "Only English", "")]


def test_a_package_is_missing_until_its_own_files_are_there(tmp_path):
    """The first package has a folder of sounds too, without one Czech word; and no utterance at all is a sentence, not an empty manifest."""
    root = tmp_path / "usr/share/games/fillets-ng"

    def put(name: str) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")

    assert missing_packages(root) == ["fillets-ng-data", "fillets-ng-data-cs"]
    put("script/city/dialogs_cs.lua")
    put("sound/city/en/vit-x-end.ogg")
    assert missing_packages(root) == ["fillets-ng-data-cs"]
    put("sound/city/cs/vit-x-end.ogg")
    assert missing_packages(root) == []
    with pytest.raises(UserError, match="holds no Czech sound with an English text"):
        fetch_fillets(tmp_path)
    assert not (tmp_path / "manifest.tsv").exists()
