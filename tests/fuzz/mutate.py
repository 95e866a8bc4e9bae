"""JSON changed as JSON: a value for another, one left out, one twice, one deep inside another; the fuzzer's
own bytes otherwise.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Place = tuple[Any, Any]
# text that stands for itself in what is written
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1" + "0" * 400,
    "1" * 5000,
    "1e999",
    "-0.0",
    "[" * 2000 + "]" * 2000,
    '{"a":1,"a":2}',
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    2**31,
    2**63,
    2**64,
    0.5,
    1e308,
    5e-324,
    "",
    " ",
    "a",
    "a.b",
    "../x",
    "/dev/null",
    "\0",
    "\ud800",
    "\u202e",
    "\x1b[31m",
    "x" * 700,
    "float32",
    [],
    {},
    [[]],
    [1, 2],
    {"a": 1},
    [None],
)


def places(value: Any) -> Iterator[Place]:
    """(container, key) of every value below this one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def change(value: Any, rng: random.Random) -> Any:
    """One change somewhere in a JSON value."""
    box = [value]
    container, key = rng.choice(list(places(box)))
    kind = rng.randrange(6)
    if kind == 0 and container is not box:
        del container[key]
    elif kind == 1 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
        container[key] = rng.choice(
            [
                -container[key],
                container[key] + 1,
                container[key] * 2,
                float(min(container[key], 2**1000)),
                str(container[key]),
            ]
        )
    elif kind == 2:
        other, there = rng.choice(list(places(box)))
        container[key] = json.loads(json.dumps(other[there]))
    elif kind == 3 and isinstance(container, list):
        container.append(container[key] if rng.random() < 0.5 else copy.deepcopy(rng.choice(VALUES)))
    elif kind == 4 and isinstance(container, dict):
        container[str(rng.choice([*VALUES[13:26], *list(container)]))] = container.pop(key)
    else:
        container[key] = copy.deepcopy(rng.choice(VALUES))
    return box[0]


def mutate(data: bytes, most: int, seed: int, plain: Callable[[bytes, int], bytes]) -> bytes:
    """Half of the time one to four changes of the JSON, else (or where it is none) bytes as `plain` mutates
    them.
    """
    rng = random.Random(seed)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return plain(data, most)
    if rng.random() < 0.5:
        return plain(data, most)
    try:
        for _ in range(rng.randint(1, 4)):
            value = change(value, rng)
        made = json.dumps(value)
    except (ValueError, RecursionError, OverflowError):
        return plain(data, most)
    if rng.random() < 0.15:
        mark = json.dumps(copy.deepcopy(rng.choice(VALUES)))
        made = made.replace(mark, rng.choice(RAW), 1)
    return made.encode("utf-8", "surrogateescape")[:most]
