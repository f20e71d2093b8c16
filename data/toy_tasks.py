"""Tasks from a seeded generator: pairs of a prompt and its answer; no prompt occurs twice.

orders   a sentence in, the order in it as JSON out; 12 phrasings to train on and 4 that training
         never sees
roman    a number in, its Roman numeral out: a small model fails at this task, because its tokenizer
         splits the digits and letters in an unsuitable way
"""

import json
import random
from collections.abc import Callable
from functools import partial

Pair = tuple[str, str]  # (prompt, answer)

NAMES = (
    "Alice Bob Carla Dmitri Elena Farid Grace Hiro Ines Jack Keiko Liam Maria Noah Olga Priya "
    "Quinn Rosa Sam Tara"
).split()
CITIES = (
    "Paris Oslo Lima Cairo Tokyo Quito Rome Delhi Boston Lagos Sydney Berlin Madrid Toronto "
    "Nairobi Seoul"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ITEMS = (
    "apples, blue pens, coffee mugs, desk lamps, erasers, folding chairs, green notebooks, "
    "headphones, ink cartridges, keyboards, light bulbs, monitors, napkins, oranges, paper clips, "
    "rulers, staplers, tea bags, wine"
).split(", ")
PHRASINGS = [
    "{name} from {city} wants {quantity} {item} by {day}.",
    "Please ship {quantity} {item} to {name} in {city} before {day}.",
    "Hi, this is {name}. Could you send {quantity} {item} to {city}? I need them on {day}.",
    "By {day}, {name} needs {quantity} {item} delivered to {city}.",
    "Order for {city}: {quantity} {item}, customer {name}, due {day}.",
    "We are out of {item}! {name} here in {city}, send {quantity} more, {day} at the latest.",
    "{city}, {day}: {quantity} {item} for {name}.",
    "Can {name} get {quantity} {item} in {city} on {day}?",
    "{quantity} {item} please. Name: {name}. City: {city}. Day: {day}.",
    "On {day} a parcel with {quantity} {item} must reach {name}, who lives in {city}.",
    "{name} called. It is about {quantity} {item}, to be in {city} by {day}.",
    "I would like {quantity} {item}, delivered on {day} to {name} at our {city} office.",
]
UNSEEN_PHRASINGS = [
    "Our {city} branch is waiting for {quantity} {item}; {name} will sign for them on {day}.",
    "No later than {day}, have {item} ready for {name} in {city}, {quantity} of them.",
    "For {name}: {item}, {quantity} pieces, {day}, {city}.",
    "It's {name} again, still in {city}. Make that {quantity} {item}, and {day} is fine.",
]


def orders(rng: random.Random) -> tuple[list[Pair], ...]:
    """4000 pairs to train on, 100 held out with the same 12 phrasings, 50 with the 4 others."""
    known = _distinct_pairs(partial(_random_order, rng, PHRASINGS), 4100)
    unseen = _distinct_pairs(partial(_random_order, rng, UNSEEN_PHRASINGS), 50)
    return known[100:], known[:100], unseen


def _random_order(rng: random.Random, phrasings: list[str]) -> Pair:
    fields = {
        "name": rng.choice(NAMES),
        "item": rng.choice(ITEMS),
        "quantity": rng.randrange(2, 99),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }
    sentence = rng.choice(phrasings).format(**fields)
    return f"Extract the order as JSON: {sentence}", json.dumps(fields)


def _distinct_pairs(make: Callable[[], Pair], count: int) -> list[Pair]:
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        prompt, answer = make()
        pairs.setdefault(prompt, answer)
    return list(pairs.items())


def roman(rng: random.Random) -> tuple[list[Pair], ...]:
    """The numbers below 2000: 1899 to train on and 100 held out."""
    numbers = rng.sample(range(1, 2000), 1999)
    pairs = [(f"Write {n} as a Roman numeral.", roman_numeral(n)) for n in numbers]
    return pairs[100:], pairs[:100]


def roman_numeral(n: int) -> str:
    """
    >>> roman_numeral(1994)
    'MCMXCIV'
    """
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    numeral = ""
    for value, letters in zip(values, "M CM D CD C XC L XL X IX V IV I".split()):
        numeral += letters * (n // value)
        n %= value
    return numeral


TASKS = {"orders": orders, "roman": roman}
