"""Generate the built-in tasks: `python -m deltatune.tasks.builtin.make` rewrites the files beside this one.

The words of train, dev and test are disjoint in every task, so a test example is answered only by who already knows
its words: what a pre-trained backbone brings, and a randomly initialised one does not. All choices come from a fixed
seed; the sentences' frames are shared by all labels, so a frame never gives the answer away.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deltatune import files
from deltatune.tasks.builtin import words
from deltatune.tasks.example import SPLITS, Split, list_options

HERE = Path(__file__).parent
SIZES: dict[Split, int] = {"train": 360, "dev": 96, "test": 192}
SHARES: dict[Split, float] = {"train": 0.6, "dev": 0.15, "test": 0.25}

Record = dict[str, Any]
Maker = Callable[[Split, random.Random], Iterator[Record]]

TOPIC_FRAMES = (
    "We spoke about the {0}, the {1} and the {2} for an hour.",
    "The book tells us of the {0}, the {1} and the {2}.",
    "She wrote a long letter about the {0}, the {1} and the {2}.",
    "Nobody here knew much about the {0}, the {1} or the {2}.",
    "First they asked about the {0} and the {1}, and then about the {2}.",
    "I remember the {0}, the {1} and also the {2}.",
    "There was a picture of the {0} next to the {1} and the {2}.",
    "In those years the {0}, the {1} and the {2} were everything.",
)
SENTIMENT_FRAMES = (
    "The {3} was {0}, {1} and {2}.",
    "They found the {3} {0}, {1} and {2}.",
    "I thought that the {3} was {0} and {1}, even {2}.",
    "Everybody said how {0}, how {1} and how {2} the {3} had been.",
    "It was a {3} that seemed {0}, {1} and {2} to us all.",
)
SENTIMENT_THINGS = ("day", "man", "woman", "story", "song", "place", "town", "journey", "evening", "answer")
PRONOUN_FRAMES = (
    "We looked for the {0} all morning, but",
    "Nobody noticed the {0} at first, because",
    "I remember the {0} very well, for",
    "People talked about the {0} as if",
    "You will see the {0} again when",
    "My friend said of the {0} that",
)
GIST_FRAMES = (
    "The {0} spoke of the {1} and the {2}.",
    "The {0} asked us about the {1} and about the {2}.",
    "We heard from the {0} that the {1} was like the {2}.",
    "As for the {1} or the {2}, the {0} knew everything.",
)
AGREEMENT_STEMS = (
    "The {0}",
    "I think that the {0}",
    "In the end the {0}",
    "The {0} near the {1}",
    "The {0} of the {1}",
)
AGREEMENT_ENDS = (
    ("is here.", "are here."),
    ("was gone.", "were gone."),
    ("has changed.", "have changed."),
    ("does not move.", "do not move."),
    ("comes back.", "come back."),
    ("looks strange.", "look strange."),
)
SERIES_FRAMES = (
    "We talked about the {0}, the {1}, the {2} and the",
    "She wrote of the {0}, of the {1}, of the {2} and of the",
    "There is a picture of the {0}, the {1}, the {2} and the",
    "I remember the {0}, the {1}, the {2} and the",
)
AUXILIARIES = ("can", "will", "must", "should", "may")
ADJECTIVES = ("old", "young", "little", "poor", "good")
PLACES = ("in the morning", "before dinner", "near the water", "for an hour", "after the storm", "in the dark", "today")


def share(items: Sequence[str], split: Split, seed: str) -> list[str]:
    """Return the part of `items` that belongs to a split; the parts of the three splits are disjoint."""
    shuffled = sorted(items)
    random.Random(seed).shuffle(shuffled)
    ends = [round(end * len(shuffled)) for end in itertools.accumulate(SHARES.values())]
    place = SPLITS.index(split)
    return shuffled[[0, *ends][place] : ends[place]]


def topic(split: Split, rng: random.Random) -> Iterator[Record]:
    """Three nouns of one field in a neutral sentence."""
    nouns = {label: share(text.split(), split, label) for label, text in words.TOPICS.items()}
    for label in itertools.cycle(nouns):
        yield {"input": rng.choice(TOPIC_FRAMES).format(*rng.sample(nouns[label], 3)), "target": label}


def sentiment(split: Split, rng: random.Random) -> Iterator[Record]:
    """Three adjectives of one polarity said of a neutral thing."""
    adjectives = {
        "positive": share(words.POSITIVE.split(), split, "positive"),
        "negative": share(words.NEGATIVE.split(), split, "negative"),
    }
    for label in itertools.cycle(adjectives):
        sentence = rng.choice(SENTIMENT_FRAMES).format(*rng.sample(adjectives[label], 3), rng.choice(SENTIMENT_THINGS))
        yield {"input": sentence, "target": label}


def pronoun(split: Split, rng: random.Random) -> Iterator[Record]:
    """The opening of a sentence about a noun, whose pronoun comes next."""
    nouns = {label: share(text.split(), split, label) for label, text in words.PRONOUNS.items()}
    for label in itertools.cycle(nouns):
        yield {"input": rng.choice(PRONOUN_FRAMES).format(rng.choice(nouns[label])), "target": label}


def agreement(split: Split, rng: random.Random) -> Iterator[Record]:
    """A subject, sometimes with a second noun behind it, and two predicates of which one agrees with it."""
    nouns = share(words.SINGULAR.split(), split, "agreement")
    for letter, number in itertools.cycle(itertools.product("AB", (0, 1))):
        first, second = rng.sample(nouns, 2)
        forms = (first, plural(first))[number], rng.choice((second, plural(second)))
        ends = rng.choice(AGREEMENT_ENDS)
        right, wrong = ends[number], ends[1 - number]
        options = [right, wrong] if letter == "A" else [wrong, right]
        yield choice(rng.choice(AGREEMENT_STEMS).format(*forms), options, letter)


def series(split: Split, rng: random.Random) -> Iterator[Record]:
    """Three words of one field, and four further words of which one is of that field."""
    fields = {**words.TOPICS, **words.FIELDS}
    nouns = {field: share(text.split(), split, f"series {field}") for field, text in fields.items()}
    for letter in itertools.cycle("ABCD"):
        field, *others = rng.sample(list(fields), 4)
        *context, fitting = rng.sample(nouns[field], 4)
        options = [rng.choice(nouns[other]) for other in others]
        options.insert("ABCD".index(letter), fitting)
        yield choice(rng.choice(SERIES_FRAMES).format(*context), options, letter)


def gist(split: Split, rng: random.Random) -> Iterator[Record]:
    """A person and two nouns of one field, to be summed up as a man or a woman, and the field."""
    nouns = {field: share(text.split(), split, f"gist {field}") for field, text in words.TOPICS.items()}
    # A bishop or a soldier would tell the field.
    fielded = " ".join(words.TOPICS.values()).split()
    people = {
        sex: share([word for word in words.PRONOUNS[said].split() if word not in fielded], split, sex)
        for sex, said in (("man", "he"), ("woman", "she"))
    }
    for sex, field in itertools.cycle(itertools.product(people, nouns)):
        sentence = rng.choice(GIST_FRAMES).format(rng.choice(people[sex]), *rng.sample(nouns[field], 2))
        yield {"input": sentence, "target": f"a {sex} talks about {field}"}


def question(split: Split, rng: random.Random) -> Iterator[Record]:
    """A statement, to be turned into the question that it answers."""
    nouns = share(words.SINGULAR.split(), split, "question")
    actions = share(words.ACTIONS.split(), split, "question")
    while True:
        subject = f"the {rng.choice(ADJECTIVES)} {rng.choice(nouns)}"
        auxiliary, action, place = rng.choice(AUXILIARIES), rng.choice(actions), rng.choice(PLACES)
        yield {
            "input": f"{subject.capitalize()} {auxiliary} {action} {place}.",
            "target": f"{auxiliary.capitalize()} {subject} {action} {place}?",
        }


def choice(stem: str, options: list[str], letter: str) -> Record:
    """Return a multiple choice record, its options listed under the stem."""
    return {"input": stem + "\n" + list_options(tuple(options)), "target": letter, "options": options}


def plural(noun: str) -> str:
    """Return the plural of a noun of the lists."""
    if noun in words.IRREGULAR_PLURALS:
        return words.IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else noun + "s"


def records(name: str, labels: Sequence[str], maker: Maker) -> list[Record]:
    """Return the records of a task: as many as `SIZES` says of each split, no input twice, labels in equal parts."""
    made: list[Record] = []
    for split, size in SIZES.items():
        rng = random.Random(f"{name}/{split}")
        part = take(maker(split, rng), size, size // max(1, len(labels)))
        rng.shuffle(part)
        for number, record in enumerate(part):
            head = {"id": f"{name}/{split}/{number}", "split": split, "input": record["input"]}
            made.append({**head, "target": record["target"], "references": [record["target"]], **record})
    return made


def take(source: Iterator[Record], size: int, quota: int) -> list[Record]:
    """Take `size` records with different inputs; of a target at most `quota`."""
    seen: set[str] = set()
    counts: dict[str, int] = {}
    taken: list[Record] = []
    while len(taken) < size:
        record = next(source)
        full = counts.get(record["target"], 0) == quota
        if record["input"] not in seen and not full:
            seen.add(record["input"])
            counts[record["target"]] = counts.get(record["target"], 0) + 1
            taken.append(record)
    return taken


def describe() -> list[Record]:
    """Return the index entries of the tasks, without what depends on their files."""
    return json.loads((HERE / "about.json").read_text(encoding="utf-8"))


def main(folder: Path = HERE) -> None:
    """Write the files and the index of all built-in tasks into a folder."""
    makers: dict[str, Maker] = {
        maker.__name__: maker for maker in (topic, sentiment, pronoun, agreement, series, gist, question)
    }
    listed = []
    for entry in describe():
        made = records(entry["name"], entry.get("labels", ()), makers[entry["name"]])
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made)
        data = gzip.compress(lines.encode(), mtime=0)
        files.write_bytes(folder / f"{entry['name']}.jsonl.gz", data)
        listed.append({**entry, "sizes": SIZES, "sha256": hashlib.sha256(data).hexdigest()})
    files.write_json(folder / "tasks.json", {"tasks": listed})


if __name__ == "__main__":
    main()
