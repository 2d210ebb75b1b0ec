"""``ergo-rl prepare``: write a data set as Parquet, the embedded one (panels) or a published one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from ergo_rl.jobs.cli import command
from ergo_rl.questions.conventions import Answers, BoxCorners, BoxUnit, Letters, NoneText, Told
from ergo_rl.questions.formats import FIELDS, FORMATS
from ergo_rl.questions.prepare import Conversion, convert_dataset, prepare_panels, summary

TELLS: dict[str, tuple[type[StrEnum], str]] = {
    "boxes": (BoxUnit, "unit of the numbers of a box"),
    "corners": (BoxCorners, "what the four numbers of a box are: two corners, or a corner with width and height"),
    "letters": (Letters, "whether letters in front of options are taken off"),
    "answers": (Answers, "what an answer is: the letter or the text of an option, or its number from zero or one"),
    "none": (NoneText, 'what the text "None" in a column of options is'),
}
"""What the user may say of the rows, by field of ``Told``."""


@command("prepare", also=(ValueError,))
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl prepare",
        description="Write a data set as the Parquet files that training reads. Files that exist already, made from "
        "the same source with the same settings, stay as they are.",
        epilog="example: ergo-rl prepare vstar vstar_bench/test_questions.jsonl --out data/vstar.parquet",
    )
    kinds = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    _add_panels(kinds.add_parser("panels", help="the embedded data set, generated from the seed"))
    for name, dataset in FORMATS.items():
        _add_conversion(kinds.add_parser(name, help=dataset.title, description=f"{dataset.title}. {dataset.card}"))
    options = parser.parse_args(argv)
    if options.dataset == "panels":
        paths = prepare_panels(options.out, options.train, options.heldout, options.seed)
    else:
        conversion = _conversion(options)
        print(summary(convert_dataset(conversion), conversion.files))
        paths = [conversion.out, conversion.report_path]
    for path in paths:
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MB")
    return 0


def _add_panels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("data/panels"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--train", type=int, default=4096, help="rows to train on (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=512, help="rows to evaluate on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")


def _spelled(choice: str) -> str:
    return "shares" if choice == "share" else choice  # its former name


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="files with the rows (.jsonl .json .tsv .csv "
                        ".parquet), patterns, or folders that have some, also in a folder data/")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.parquet")
    parser.add_argument(
        "--images", type=Path, action="append", default=[], metavar="PLACE",
        help="folder, .zip or .tar of the images that rows name; may be given more than once (the folder of the rows "
        "is looked through in any case)",
    )  # fmt: skip
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"another column for one of {', '.join(FIELDS)}",
    )
    for name, (kind, explained) in TELLS.items():
        flags = [f"--{name}", "--unit"] if name == "boxes" else [f"--{name}"]
        choices = [str(one) for one in kind if one is not Answers.WORDS]
        parser.add_argument(
            *flags,
            choices=choices,
            type=_spelled,
            help=f"{explained} (default: what the rows show)",
        )
    parser.add_argument("--limit", type=int, help="read only this many rows")
    parser.add_argument("--decode", action="store_true", help="decode every image completely, not only its header")


def _conversion(options: argparse.Namespace) -> Conversion:
    pairs = [pair.partition("=") for pair in options.map]
    if wrong := [name for name, equals, column in pairs if not (equals and column)]:
        raise ValueError(f"--map {wrong[0]}: write FIELD=COLUMN, e.g. --map text=question")
    if options.out.suffix != ".parquet":
        raise ValueError(f"--out {options.out}: its name must end in .parquet")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit}: at least 1")
    dataset = FORMATS[options.dataset].renamed({name: column for name, _, column in pairs})
    said: dict[str, Any] = {
        name: kind(value) for name, (kind, _) in TELLS.items() if (value := getattr(options, name)) is not None
    }
    return Conversion(
        dataset, tuple(options.files), tuple(options.images), options.out, options.limit, options.decode, Told(**said)
    )


if __name__ == "__main__":
    raise SystemExit(main())
