"""The demo's preference pairs, made by program: three small tasks in which a rule says which completion is better.

========  ==============================================  ==============================  ===================
task      prompt                                          chosen                          rejected
========  ==============================================  ==============================  ===================
category  Which one is the fruit: the axe or the plum?    the word of the category        the other word
number    Which is smaller, 34 or 71?                     the number that answers         the other number
courtesy  Write to Dr. Reed: ask them for the map.        formal to a title, informal to  the other register
                                                          a friend or relative
========  ==============================================  ==============================  ===================

Neither completion gives itself away: both have the same form, each word, number and register is chosen about as often
as it is rejected, and places in the prompt are drawn at random. Only a model that has learned the rule can tell.
Training and held-out pairs are made of different facts (two words, two numbers, a person and an errand), so no held-out
fact was seen in training in any wording or order.
"""

import json
import random
from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

from dpo_fast.errors import UsageError

Row = dict[str, str]

WORDS = {
    "animal": ("fox", "horse", "goat", "crow", "trout", "hare", "mouse", "owl"),
    "fruit": ("plum", "pear", "fig", "grape", "peach", "lemon", "melon", "cherry"),
    "tool": ("saw", "hammer", "drill", "spade", "rake", "chisel", "file", "axe"),
    "garment": ("coat", "hat", "scarf", "glove", "boot", "sock", "shirt", "belt"),
}
FORMAL_PEOPLE = tuple(
    product(("Dr.", "Prof.", "Mr.", "Ms."), ("Reed", "Stone", "Field", "Marsh", "Brook", "Hill")),
)
FAMILIAR_PEOPLE = tuple(
    product(
        ("your friend", "your cousin", "your aunt", "your brother"), ("Anna", "Ben", "Clara", "Emma", "Felix", "Jo")
    ),
)
OBJECTS = ("report", "letter", "invoice", "ticket", "key", "photograph", "map", "recipe")


def make_pairs(train_pairs: int, held_out_pairs: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Make the training pairs and the held-out pairs.

    Args:
        train_pairs: number of training pairs, divided among the three tasks as evenly as it goes.
        held_out_pairs: number of held-out pairs, divided likewise.
        seed: what the pairs are drawn from; the same seed makes the same pairs.

    Returns:
        The training rows and the held-out rows, each shuffled, with the columns `prompt`, `chosen`, `rejected` (the
        completions begin with their space) and `task`. No fact is in both, so no prompt is either.

    Raises:
        UsageError: a task has fewer facts than pairs are asked of it.
    """
    # Not for secrets; `random.Random` draws the same on every platform and version.
    draw = random.Random(seed)  # noqa: S311
    facts: dict[str, list[Any]] = {
        "category": [
            ((category, word), (other_category, other))
            for category, other_category in combinations(WORDS, 2)
            for word, other in product(WORDS[category], WORDS[other_category])
        ],
        "number": list(combinations(range(10, 100), 2)),
        "courtesy": list(product(FORMAL_PEOPLE + FAMILIAR_PEOPLE, OBJECTS, ("thank", "ask"))),
    }
    write_row: dict[str, Callable[[Any, random.Random], Row]] = {
        "category": category_row,
        "number": number_row,
        "courtesy": courtesy_row,
    }

    train: list[Row] = []
    held_out: list[Row] = []
    for index, (task, task_facts) in enumerate(facts.items()):
        train_count = (train_pairs + index) // len(facts)
        held_out_count = (held_out_pairs + index) // len(facts)
        if train_count + held_out_count > len(task_facts):
            raise UsageError(
                f"{train_pairs} training and {held_out_pairs} held-out pairs need {train_count + held_out_count} facts "
                f"of the task {task!r}, which has {len(task_facts)}; ask for fewer pairs"
            )
        drawn = draw.sample(task_facts, train_count + held_out_count)
        rows = [{**write_row[task](fact, draw), "task": task} for fact in drawn]
        train += rows[:train_count]
        held_out += rows[train_count:]
    draw.shuffle(train)
    draw.shuffle(held_out)
    return train, held_out


def category_row(fact: tuple[tuple[str, str], tuple[str, str]], draw: random.Random) -> Row:
    """Ask which of two words belongs to a category; `fact` is two (category, word)."""
    (category, right), (_, wrong) = draw.sample(fact, 2)
    first, second = draw.sample((right, wrong), 2)
    prompt = draw.choice(
        (
            f"Which one is the {category}: the {first} or the {second}?",
            f"Here are the {first} and the {second}. Name the {category}.",
        )
    )
    return {
        "prompt": prompt,
        "chosen": f" The {category} is the {right}.",
        "rejected": f" The {category} is the {wrong}.",
    }


def number_row(fact: tuple[int, int], draw: random.Random) -> Row:
    """Ask which of two numbers is larger, or smaller; `fact` is the smaller and the larger."""
    smaller, larger = fact
    word, right, wrong = draw.choice((("larger", larger, smaller), ("smaller", smaller, larger)))
    first, second = draw.sample(fact, 2)
    prompt = draw.choice(
        (
            f"Which is {word}, {first} or {second}?",
            f"Here are {first} and {second}. Name the {word} number.",
        )
    )
    return {
        "prompt": prompt,
        "chosen": f" The {word} number is {right}.",
        "rejected": f" The {word} number is {wrong}.",
    }


def courtesy_row(fact: tuple[tuple[str, str], str, str], draw: random.Random) -> Row:
    """Ask for a short note, formal to a person with a title and informal to a friend or relative.

    Args:
        fact: the person (title or relation, name), the object, and "thank" or "ask".
        draw: where the wording is drawn from.
    """
    (relation, name), thing, errand = fact
    person = f"{relation} {name}"
    is_formal = (relation, name) in FORMAL_PEOPLE
    prompt = draw.choice(
        (
            f"Write to {person}: {errand} them for the {thing}.",
            f"A note to {person}, to {errand} them for the {thing}.",
        )
    )
    formal_name = person if is_formal else name
    if errand == "thank":
        formal = f" Dear {formal_name}, thank you for the {thing}. Kind regards."
        informal = f" Hi {name}, thanks for the {thing}! Bye."
    else:
        formal = f" Dear {formal_name}, would you send the {thing}? Kind regards."
        informal = f" Hi {name}, send me the {thing}! Bye."
    chosen, rejected = (formal, informal) if is_formal else (informal, formal)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_jsonl(rows: Sequence[Row], path: Path) -> None:
    """Write one JSON object a line, UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
