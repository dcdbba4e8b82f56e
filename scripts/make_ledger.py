#!/usr/bin/env python3
"""Write lcx/texts/ledger.txt: a harbour's day book, generated, whose entries refer back to earlier ones.

    python scripts/make_ledger.py --out=lcx/texts/ledger.txt

Each entry has a number, goods, a count, people and a voucher of six characters that nothing but an earlier entry tells.  Two of three
entries settle, correct or ask after an earlier one and repeat its particulars, at a distance that is spread evenly over its logarithm:
1 to 50 deliveries, some 1 to 150 entries or 50 to 7,000 tokens.  A method that has forgotten the earlier entry cannot know the voucher.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

SEED = 20_240_817
ENTRIES = 1_400
FARTHEST = 50  # deliveries back; one of three entries is one
GOODS = (
    "cider", "copper wire", "dried figs", "linseed oil", "slate", "barley", "salt cod", "beeswax", "roofing lead", "indigo",
    "white pine", "tallow candles", "olive oil", "raw wool", "nutmeg", "glass panes", "hemp rope", "black tea", "cork", "alum",
)  # fmt: skip
UNITS = ("casks", "crates", "bales", "sacks", "barrels", "chests", "bundles")
FIRST = (
    "Agnes",
    "Bertram",
    "Cecily",
    "Duncan",
    "Edith",
    "Fergus",
    "Gwen",
    "Hugh",
    "Isolde",
    "Jonas",
    "Keziah",
    "Lionel",
    "Maud",
    "Ned",
    "Olive",
    "Piers",
)
LAST = (
    "Ashdown",
    "Brockway",
    "Carrow",
    "Dunmore",
    "Elphick",
    "Fairlie",
    "Garland",
    "Holloway",
    "Inskip",
    "Jessop",
    "Kettle",
    "Lorimer",
    "Marchbank",
    "Nettleton",
)
SHIPS = (
    "Heron",
    "Marigold",
    "North Star",
    "Curlew",
    "Prudence",
    "Saltwind",
    "Three Brothers",
    "Lady Anne",
    "Petrel",
    "Fortune",
)
PORTS = ("Varne", "Ostmouth", "Kilbride", "Selsey Quay", "Tarrin", "Wexholm", "Port Merrow", "Cold Haven")
CODE = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # without signs that look alike


def delivery(rng: random.Random, number: int) -> dict[str, str]:
    return {
        "number": f"{number}",
        "person": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
        "goods": f"{rng.randint(3, 96)} {rng.choice(UNITS)} of {rng.choice(GOODS)}",
        "ship": rng.choice(SHIPS),
        "port": rng.choice(PORTS),
        "voucher": "".join(rng.choice(CODE) for _ in range(6)),
        "price": f"{rng.randint(11, 990)} crowns",
    }


NEW = (
    "No. {number}. The {ship} from {port} landed {goods} for {person}, voucher {voucher}, valued at {price}.",
    "No. {number}. {person} sent {goods} to {port} by the {ship}. Voucher {voucher}; duty paid on {price}.",
)
BACK = (
    "No. {own}. Settled no. {number}: {person} paid {price} for {goods}, voucher {voucher}.",
    "No. {own}. Inquiry about voucher {voucher}: it is no. {number}, {goods} by the {ship}, in the name of {person}.",
    "No. {own}. {person} of no. {number} collected the {goods} that the {ship} brought from {port}; voucher {voucher} is void.",
    "No. {own}. Correction to no. {number}: the {goods} of {person}, voucher {voucher}, are to be valued at {price} as first written.",
)


def ledger(seed: int = SEED, entries: int = ENTRIES) -> str:
    """Return the text: one entry a line, a heading before every fiftieth."""
    rng = random.Random(seed)  # noqa: S311, a text and no secret
    lines: list[str] = []
    known: list[dict[str, str]] = []
    for number in range(1, entries + 1):
        if number % 50 == 1:
            lines.append(f"\nDay book of the harbour office, sheet {number // 50 + 1}\n")
        if len(known) > 2 and rng.random() < 2 / 3:
            back = int(min(FARTHEST, len(known)) ** rng.random())
            lines.append(rng.choice(BACK).format(own=number, **known[-max(1, back)]))
        else:
            known.append(delivery(rng, number))
            lines.append(rng.choice(NEW).format(**known[-1]))
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.parse_args().out.write_text(ledger(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
