"""`megadsl data fetch fillets-ng`: Czech acted dialogue with English texts, from two Debian packages of a game (GPL-2).

Sound is sound/LEVEL/cs/ID.ogg of fillets-ng-data-cs; texts are script/LEVEL/dialogs_cs.lua of fillets-ng-data, where
dialogId("ID", "font", "english text") is followed by dialogStr("czech text").
"""

import re
from pathlib import Path

from megadsl.data.atomic_files import written_atomically
from megadsl.data.debian import unpack_package
from megadsl.errors import UserError
from megadsl.tasks.speech.features import FRAMES_PER_SECOND, require_packages

# By package, what is there once it is unpacked. Both have a folder "sound": the first one's holds noises and English.
PACKAGES = {"fillets-ng-data": "script/*/dialogs_cs.lua", "fillets-ng-data-cs": "sound/*/cs/*.ogg"}
_TEXT = r'"((?:[^"\\]|\\.)*)"'
_DIALOG = re.compile(rf'dialogId\(\s*"([^"]+)"\s*,\s*"[^"]*"\s*,\s*{_TEXT}\s*\)\s*(?:dialogStr\(\s*{_TEXT}\s*\))?')


def fetch_fillets(output: Path) -> tuple[Path, int]:
    """Download and unpack the packages into `output` (nothing is installed); (manifest.tsv, number of utterances)."""
    require_packages()
    root = output / "usr" / "share" / "games" / "fillets-ng"
    for package in missing_packages(root):
        unpack_package(package, output)
    rows = _rows(root, output)
    if not rows:
        raise UserError(f"{root} holds no Czech sound with an English text; the packages {' and '.join(PACKAGES)} have changed, or {output} is damaged: "
                        "empty it and fetch again.")
    manifest = output / "manifest.tsv"
    with written_atomically(manifest) as temporary:
        lines = ["\t".join(("id", "audio", "n_frames", "tgt_text", "src_text")), *("\t".join(row) for row in rows)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest, len(rows)


def missing_packages(root: Path) -> list[str]:
    """Which of the packages are not unpacked yet."""
    return [package for package, inside in PACKAGES.items() if not any(root.glob(inside))]


def _rows(root: Path, output: Path) -> list[tuple[str, ...]]:
    """(id, audio, n_frames, tgt_text, src_text) of every sound that has a text."""
    import soundfile

    rows = []
    for script in sorted(root.glob("script/*/dialogs_cs.lua")):
        level = script.parent.name
        for name, english, czech in dialogs(script.read_text(encoding="utf-8")):
            audio = root / "sound" / level / "cs" / f"{name}.ogg"
            if audio.is_file() and english:
                frames = round(soundfile.info(audio).duration * FRAMES_PER_SECOND)
                rows.append((f"{level}/{name}", str(audio.relative_to(output)), str(frames), english, czech))
    return rows


def dialogs(text: str) -> list[tuple[str, str, str]]:
    """(id, english, czech) of a dialogs_cs.lua; a text that comes twice counts once."""
    found = {}
    for name, english, czech in _DIALOG.findall(text):
        found.setdefault(name, (name, _plain(english), _plain(czech)))
    return list(found.values())


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\\(.)", lambda match: " " if match[1] in "nt" else match[1], text).split())
