"""The texts that the base is trained on: the corpus and the training notes."""

import gzip
import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import clinora
from clinora.notes import TEXT_COLUMN, clean_text, find_notes
from clinora.tables import as_text, open_table

# For each source: how often it is read, and the GitHub repositories that it comes from, with their
# revisions. Texts that resemble notes are read more often than articles and leaflets.
SOURCES = {
    "acibench_notes": (4, "wyim/aci-bench@b909b2b"),
    "primock57_notes": (4, "babylonhealth/primock57@cd2ac70"),
    "trec_patient_topics": (4, "ncbi-nlp/TrialGPT@f621313"),
    "medec_ms": (4, "abachaa/MEDEC@70268d2"),
    "e3c_case_reports": (2, "hltfbk/E3C-Corpus@8196181e"),
    "roco_captions": (2, "razorx89/roco-dataset@a1f0ad6"),
    "casimedicos": (1, "ixa-ehu/antidote-casimedicos@bead23e"),
    "vaers_narratives": (1, "rferrisx/VAERS@c5b6141", "OHNLP/covid19vaxae@b328bfe"),
    "docsref_im_guide": (1, "jzstraley/docsref@87c198ef2"),
    "medical_abstracts": (1, "sebischair/Medical-Abstracts-TC-Corpus@70a2d91"),
    "pubmedqa": (1, "pubmedqa/pubmedqa@1cbae8e"),
    "fda_label_sections": (1, "LHNCBC/fda-ars@8a5f850"),
    # Later revisions have another licence.
    "openstax": (
        1,
        "openstax/osbooks-anatomy-physiology@b0058a7",
        "openstax/osbooks-microbiology@ecf34da",
        "openstax/osbooks-psychology@e061043",
    ),
    "neiss_fireworks": (1, "drusho/Analysis_of_US_Firework_Sales_and_Injuries@be98cd9"),
    "medquad": (1, "abachaa/MedQuAD@577bd37"),
    "evidence_inference": (0.5, "jayded/evidence-inference@b9831b6c"),
}
NOTES_REPEATS = 4
NOTES_ORIGIN = (
    "[harishnair04/mtsamples](https://huggingface.co/datasets/harishnair04/mtsamples), published "
    "as CC0 on [Kaggle](https://www.kaggle.com/datasets/tboyle10/medicaltranscriptions)"
)
HELD_OUT = 100  # one text in this many is held out to measure the loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Texts of one origin.

    Attributes:
        name: Name of the file, without its extensions.
        texts: The texts to train on.
        held_out: The texts to measure the loss on.
        titles: By text, the title that follows it; texts may have none.
        licenses: The licences of the texts.
        repeats: How often the texts are read.
        origin: Where the texts were published, in Markdown.
    """

    name: str
    texts: list[str]
    held_out: list[str]
    titles: dict[str, str]
    licenses: tuple[str, ...]
    repeats: float
    origin: str


def read_sources(corpus: Path, notes: str, seed: int) -> list[Source]:
    """Read the training notes, which come first, and the corpus; hold out a hundredth of each.

    Raises:
        FileNotFoundError: The folder holds no ``*.jsonl.gz`` file.
        ValueError: A file is damaged or has another format.
    """
    files = sorted(corpus.glob("*.jsonl.gz"))
    if not files:
        raise FileNotFoundError(f"no *.jsonl.gz file in {corpus}")
    return [_read_notes(notes, seed), *(_read_file(file, seed) for file in files)]


def _read_notes(notes: str, seed: int) -> Source:
    """Read the notes of the training split, with their titles."""
    training = [note.text for note in clinora.read_notes(notes, classes="all").on("training")]
    titles = read_titles(notes)
    texts, held_out = _hold_out(training, seed)
    return Source(
        name="mtsamples",
        texts=texts,
        held_out=held_out,
        titles={text: titles[text] for text in training if text in titles},
        licenses=("CC0",),
        repeats=NOTES_REPEATS,
        origin=NOTES_ORIGIN,
    )


def _read_file(file: Path, seed: int) -> Source:
    """Read a file of the corpus.

    Raises:
        ValueError: It is not gzip, or a line is not a JSON object with text and license.
    """
    rows = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                rows.append((row["text"], row["license"]))
        for text, license in rows:
            if not isinstance(text, str) or not isinstance(license, str):
                raise TypeError
    except (gzip.BadGzipFile, zlib.error, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} ({type(error).__name__}): expected gzip, and in each line a JSON object "
            "with text and license, both strings"
        ) from None
    name = file.name.removesuffix(".jsonl.gz")
    repeats, *places = SOURCES.get(name, (1,))
    links = [f"[{place}](https://github.com/{place.replace('@', '/tree/')})" for place in places]
    texts, held_out = _hold_out([text for text, _ in rows], seed)
    return Source(
        name=name,
        texts=texts,
        held_out=held_out,
        titles={},
        licenses=tuple(sorted({license for _, license in rows})),
        repeats=repeats,
        origin=", ".join(links) or "unknown",
    )


def _hold_out(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Shuffle texts; give the texts to train on and the held-out texts."""
    shuffled = random.Random(seed).sample(texts, len(texts))
    cut = len(texts) // HELD_OUT
    return shuffled[cut:], shuffled[:cut]


def read_titles(notes: str) -> dict[str, str]:
    """Read the name and description of each text, but not its specialty, from the notes' file."""
    titles = {}
    with find_notes(notes).open("rb") as file:
        table = open_table(file, [TEXT_COLUMN, "sample_name", "description"])
        if not {"sample_name", "description"} <= set(table.header):
            return {}
        for row in table.select():
            text, name, description = [clean_text(as_text(cell)) for cell in row.cells]
            name = re.sub(r" - \d+$", "", name).strip()
            titles[text] = f"{name}: {description}"
    return titles


def mix(sources: Sequence[Source], seed: int) -> list[str]:
    """Repeat the texts of each source ``repeats`` times, and shuffle them all.

    If a text has a title, every second reading cuts the text after some words and continues with
    the title, so that one window holds both.
    """
    draw = random.Random(seed)
    texts = []
    for source in sources:
        whole, fraction = divmod(source.repeats, 1)
        for reading in range(int(whole)):
            cut = reading % 2 == 1
            for text in source.texts:
                texts.append(_with_title(text, source.titles.get(text), cut, draw))
        texts += draw.sample(source.texts, round(len(source.texts) * fraction))
    draw.shuffle(texts)
    return texts


def _with_title(text: str, title: str | None, cut: bool, draw: random.Random) -> str:
    if not title:
        return text
    if cut:
        words = text.split(" ")
        text = " ".join(words[: draw.randint(50, 300)])
    return f"{text}\n{title}"
