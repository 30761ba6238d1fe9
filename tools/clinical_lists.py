"""Lists of medications, lab values and abbreviations, as they stand in notes, made up at random.

What the detector of ``clinora.outliers`` is fitted with and what it is measured with share no drug,
test or abbreviation.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Words:
    """What lists are made of: drugs, lab tests with ranges, abbreviations, marks of a line."""

    drugs: tuple[str, ...]
    labs: dict[str, tuple[int, int]]
    shorthand: tuple[str, ...]
    marks: tuple[str, ...]


TO_FIT = Words(
    drugs=(
        "amlodipine 5 mg", "simvastatin 20 mg", "glipizide 10 mg", "prednisone 20 mg",
        "Zoloft 50 mg", "hydrochlorothiazide 25 mg", "Plavix 75 mg", "insulin glargine 20 units",
        "Tylenol 650 mg", "potassium chloride 20 mEq", "Synthroid 0.1 mg", "ciprofloxacin 500 mg",
    ),
    labs={
        "AST": (10, 90), "ALT": (10, 90), "sodium": (128, 150), "potassium": (3, 6),
        "CO2": (18, 30), "hematocrit": (25, 50), "platelets": (90, 450), "calcium": (8, 11),
        "albumin": (2, 5), "bilirubin": (0, 4), "creatinine": (1, 4), "TSH": (0, 9),
        "Mg": (1, 3), "Ca": (8, 11), "Phos": (2, 5), "ESR": (5, 80), "CRP": (0, 90),
        "PTT": (24, 60), "Hct": (25, 50), "MCV": (70, 100), "LDL": (60, 200), "CK": (30, 400),
        "Alk phos": (40, 200),
    },
    shorthand=(
        "PMH COPD, CAD", "s/p CABG x 3", "afeb, VSS", "c/o HA x 2 wks", "R shoulder pain",
        "Rx ibuprofen", "neg Homans", "ROM WNL", "no LE edema", "CT head neg", "h/o MI",
        "U/A pending", "RTC 1 mo", "NKDA",
    ),
    marks=("", "* ", "1. "),
)  # fmt: skip
TO_MEASURE = Words(
    drugs=(
        "aspirin 81 mg", "metoprolol 25 mg", "lisinopril 10 mg", "atorvastatin 40 mg",
        "metformin 500 mg", "omeprazole 20 mg", "furosemide 40 mg", "warfarin 5 mg",
        "albuterol inhaler", "levothyroxine 50 mcg", "gabapentin 300 mg", "citalopram 10 mg",
    ),
    labs={
        "Na": (128, 150), "K": (3, 6), "Cl": (95, 110), "BUN": (8, 60), "Cr": (1, 4),
        "WBC": (3, 20), "Hgb": (7, 17), "Plt": (90, 450), "glucose": (60, 320), "INR": (1, 4),
        "troponin": (0, 9), "A1c": (5, 13),
    },
    shorthand=(
        "pt c/o", "45M w/ CP", "72F s/p fall", "hx CHF, DM2, HTN", "no SOB, no N/V", "lungs CTAB",
        "RRR, no m/r/g", "EKG NSR", "CXR neg", "f/u 2 wks", "abd soft, NT/ND", "neuro A&O x3",
        "R knee TTP, FROM", "d/c home on abx",
    ),
    marks=("- ", "• "),
)  # fmt: skip
TIMES = ("daily", "bid", "tid", "qhs", "prn", "p.o. q.d.", "twice a day", "")


def clinical_lists(words: Words, texts: int, seed: int) -> dict[str, list[str]]:
    """Make lists of each kind; the same seed gives the same texts."""
    draw = random.Random(seed)
    return {
        "Lists of medications": [_medications(words, draw) for _ in range(texts)],
        "Lab values": [_lab_values(words, draw) for _ in range(texts)],
        "Abbreviations alone": [
            ". ".join(draw.sample(words.shorthand, draw.randint(3, 7))) for _ in range(texts)
        ],
    }


def _medications(words: Words, draw: random.Random) -> str:
    mark = draw.choice(words.marks)
    drugs = draw.sample(words.drugs, draw.randint(3, 8))
    return "\n".join(f"{mark}{drug} {draw.choice(TIMES)}".rstrip() for drug in drugs)


def _lab_values(words: Words, draw: random.Random) -> str:
    between = draw.choice((" ", ": "))
    names = draw.sample(sorted(words.labs), draw.randint(4, 9))
    values = [f"{name}{between}{draw.randint(*words.labs[name])}" for name in names]
    return draw.choice((", ", "\n", "; ")).join(values)
