"""The notes that a run has not seen, for the tools that measure one."""

import argparse

import clinora


def unseen_notes(classifier: clinora.Classifier, args: argparse.Namespace) -> list[clinora.Note]:
    """Read the notes that the options name, without those that the run has seen.

    Args:
        classifier: The run.
        args: Its ``run``, ``notes``, ``text_column`` and ``label_column`` are used.

    Returns:
        The notes in the order of their hashes, since a file may be in the order of its classes.

    Raises:
        ValueError: The run does not record which notes it has seen, or the notes cannot be used.
        OSError: The notes cannot be read.
    """
    data = classifier.data
    if data is None:
        raise ValueError(
            f"{args.run} does not record which notes it has seen: expected a run of train.py"
        )
    text_column, label_column = data.columns_in(args.notes)
    notes = clinora.read_notes(
        args.notes,
        text_column=args.text_column or text_column,
        label_column=args.label_column or label_column,
        classes=classifier.labels,
        may_lack_classes=True,
    )
    unseen = [note for note in notes.notes if not data.has_seen(note)]
    return sorted(unseen, key=lambda note: note.sha256)
