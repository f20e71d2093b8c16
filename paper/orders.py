"""Orders in three languages, from a seeded generator: what the small model reads and answers.

data/toy_tasks.py has the English sentences; the other two languages are made the same way. A value
in an answer stands there as it does in the sentence, so no language needs a dictionary.

field_question   a sentence and which three fields are wanted: "... day, city, name?" ->
                 "day Monday, city Oslo, name Sam"
extraction       a sentence alone: the answer has all five fields
"""

import random
from collections.abc import Callable

from data import toy_tasks
from data.toy_tasks import Pair

FIELDS = ["name", "item", "quantity", "city", "day"]
LANGUAGES = {
    "English": {
        "item": toy_tasks.ITEMS,
        "day": toy_tasks.DAYS,
        "phrasings": toy_tasks.PHRASINGS,
        "unseen": toy_tasks.UNSEEN_PHRASINGS,
    },
    "German": {
        "item": (
            "Äpfel, blaue Stifte, Kaffeetassen, Lampen, Radiergummis, Klappstühle, grüne Hefte, "
            "Kopfhörer, Patronen, Tastaturen, Glühbirnen, Bildschirme, Servietten, Orangen, "
            "Klammern, Lineale, Hefter, Teebeutel, Wein"
        ).split(", "),
        "day": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split(),
        "phrasings": [
            "{name} aus {city} möchte {quantity} {item} bis {day}.",
            "Bitte schicken Sie {quantity} {item} an {name} in {city} vor {day}.",
            "Bis {day} braucht {name} {quantity} {item} in {city}.",
            "Bestellung für {city}: {quantity} {item}, Kunde {name}, fällig {day}.",
            "{city}, {day}: {quantity} {item} für {name}.",
            "Am {day} muss ein Paket mit {quantity} {item} bei {name} in {city} sein.",
            "{name} hat angerufen. Es geht um {quantity} {item}, in {city} bis {day}.",
            "Uns fehlen {item}! Hier {name} in {city}, noch {quantity}, spätestens {day}.",
        ],
        "unseen": ["Für {name}: {item}, {quantity} Stück, {day}, {city}."],
    },
    "Spanish": {
        "item": (
            "manzanas, plumas azules, tazas, lámparas, gomas, sillas plegables, cuadernos verdes, "
            "auriculares, cartuchos, teclados, bombillas, pantallas, servilletas, naranjas, "
            "clips, reglas, grapadoras, bolsas de té, vino"
        ).split(", "),
        "day": "lunes martes miércoles jueves viernes sábado domingo".split(),
        "phrasings": [
            "{name} de {city} quiere {quantity} {item} para el {day}.",
            "Por favor envíe {quantity} {item} a {name} en {city} antes del {day}.",
            "Para el {day}, {name} necesita {quantity} {item} en {city}.",
            "Pedido para {city}: {quantity} {item}, cliente {name}, fecha {day}.",
            "{city}, {day}: {quantity} {item} para {name}.",
            "El {day} debe llegar un paquete con {quantity} {item} a {name}, que vive en {city}.",
            "Ha llamado {name}. Se trata de {quantity} {item}, en {city} hasta el {day}.",
            "¡Nos faltan {item}! Soy {name} en {city}, mande {quantity} más, el {day}.",
        ],
        "unseen": ["Para {name}: {item}, {quantity} piezas, {day}, {city}."],
    },
}


def random_order(rng: random.Random, language: str, phrasings: str) -> tuple[str, dict]:
    """A sentence and the fields of the order in it."""
    words = LANGUAGES[language]
    order = {
        "name": rng.choice(toy_tasks.NAMES),
        "item": rng.choice(words["item"]),
        "quantity": rng.randrange(2, 99),
        "city": rng.choice(toy_tasks.CITIES),
        "day": rng.choice(words["day"]),
    }
    return rng.choice(words[phrasings]).format(**order), order


def extraction(rng: random.Random, language: str, phrasings: str = "phrasings") -> Pair:
    """A sentence, and its order with all fields."""
    sentence, order = random_order(rng, language, phrasings)
    return sentence, as_list(order, FIELDS)


def field_question(rng: random.Random, language: str) -> Pair:
    """A sentence with a question about three fields, and their values."""
    sentence, order = random_order(rng, language, "phrasings")
    asked = rng.sample(FIELDS, 3)
    return f"{sentence} {', '.join(asked)}?", as_list(order, asked)


def as_list(order: dict, fields: list[str]) -> str:
    return ", ".join(f"{field} {order[field]}" for field in fields)


def distinct(make: Callable[[], Pair], count: int) -> list[Pair]:
    """`count` pairs with different prompts."""
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        prompt, answer = make()
        pairs.setdefault(prompt, answer)
    return list(pairs.items())
