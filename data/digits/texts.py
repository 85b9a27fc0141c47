"""What is said about pictures of digits: captions, documents, questions, and text without pictures.

Text-only samples say the same as those with pictures, with a sketch in characters where the picture
would be ("..4.7"), so that a language model warmed up on them knows the phrases, and to copy
digits out of what it sees in their order.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

READ = "Read the digits."
READ_BOTH = "Read the digits of both images."
CAPTIONS_OF_ONE = ("This is the digit {}.", "A handwritten {}.", "The digit is {}.")
CAPTIONS = ("The digits are {}.", "This image shows {}.", "Handwritten digits: {}.")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture by name, or a sketch of it in characters."""

    digits: str
    part: Record
    """What stands for it in the content of a record."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that records are about, by what they show."""

    of_one: Sequence[Picture]
    of_two: Sequence[Picture]
    close_ups: Sequence[Picture]
    """Pictures of one digit each."""

    def draw(self, rng: random.Random) -> Picture:
        """One with one or two digits."""
        return rng.choice(self.of_one if rng.random() < 0.4 else self.of_two)


def text_part(text: str) -> Record:
    """A part of content."""
    return {"type": "text", "text": text}


def sketch(rng: random.Random, num_digits: int) -> Picture:
    """A picture in characters: digits among points, in one line."""
    cells = ["."] * rng.randint(num_digits, 6)
    digits = [str(rng.randrange(10)) for _ in range(num_digits)]
    places = sorted(rng.sample(range(len(cells)), num_digits))
    for place, digit in zip(places, digits, strict=True):
        cells[place] = digit
    return Picture("".join(digits), text_part("".join(cells) + "\n"))


def classification(rng: random.Random, pictures: Pictures) -> Record:
    """A close-up of one digit and its class, bare or as an answer.

    The question stands first: what precedes a picture does not depend on it, so that only the class
    tells a ViT before a frozen language model what to learn.
    """
    picture = rng.choice(pictures.close_ups)
    question = rng.choice(("", "", "", "", f"{READ}\n"))
    return _reading(picture, question)


def caption(rng: random.Random, pictures: Pictures) -> Record:
    """A close-up of one digit with a sentence."""
    picture = rng.choice(pictures.close_ups)
    return {
        "content": [picture.part, text_part(rng.choice(CAPTIONS_OF_ONE).format(picture.digits))]
    }


def string(rng: random.Random, pictures: Pictures) -> Record:
    """One or two digits, bare, as an answer or in a sentence; or an article with two pictures.

    Most say no more than what the picture tells: what it cannot tell, as which sentence follows,
    is noise in the gradient.
    """
    if rng.random() < 0.2:
        first, second = pictures.draw(rng), pictures.draw(rng)
        return {
            "content": [
                text_part("First "),
                first.part,
                text_part(f"{first.digits}, then "),
                second.part,
                text_part(second.digits),
            ]
        }
    picture = pictures.draw(rng)
    form = rng.random()
    if form < 0.6:
        return _reading(picture, "" if form < 0.4 else f"{READ}\n")
    sentence = rng.choice((*CAPTIONS, *3 * (READ + " {}",)))
    return {"content": [picture.part, text_part(sentence.format(picture.digits))]}


def _reading(picture: Picture, question: str) -> Record:
    """What a picture shows, behind it; the question, if there is one, before it."""
    parts = [picture.part, text_part(picture.digits)]
    return {"content": [text_part(question), *parts] if question else parts}


def chat(rng: random.Random, pictures: Pictures) -> Record:
    """A question about one picture, mostly what it reads; sometimes about two."""
    picture = pictures.draw(rng)
    kind = rng.random()
    if kind < 0.7:
        return turns([picture.part, text_part(READ)], picture.digits)
    if kind < 0.8:
        other = pictures.draw(rng)
        return turns(
            [picture.part, other.part, text_part(READ_BOTH)], picture.digits + other.digits
        )
    question, answer = rng.choice(
        (
            ("How many digits are there?", str(len(picture.digits))),
            ("What is the first digit?", picture.digits[0]),
            ("What is the last digit?", picture.digits[-1]),
        )
    )
    return turns([picture.part, text_part(question)], answer)


def text(rng: random.Random, pictures: Pictures) -> Record:
    """Documents about sketches, repeated numbers, sums, and series."""
    kind = rng.random()
    if kind < 0.5:
        record = rng.choice((classification, caption, string, string))(rng, sketches(rng))
        return {"text": "".join(part["text"] for part in record["content"])}
    if kind < 0.8:  # most of it can be copied, which teaches copying soonest
        digits = "".join(str(rng.randrange(10)) for _ in range(rng.randint(2, 6)))
        return {"text": " ".join([digits] * 4)}
    if kind < 0.9:
        a = rng.randrange(10)
        b = rng.randrange(10 - a)
        return {"text": f"{a} + {b} = {a + b}"}
    start, step = rng.randrange(10), rng.choice((1, 2, 3, 7, 8, 9))
    return {"text": " ".join(str((start + i * step) % 10) for i in range(8))}


def text_chat(rng: random.Random, pictures: Pictures) -> Record:
    """Questions about sketches, and what comes next."""
    if rng.random() < 0.8:
        return chat(rng, sketches(rng))
    digit = rng.randrange(9)
    if rng.random() < 0.5:
        return turns([text_part(f"Which digit comes after {digit}?")], str(digit + 1))
    return turns([text_part(f"Which digit comes before {digit + 1}?")], str(digit))


def heldout(rng: random.Random, pictures: Pictures) -> Record:
    """Half questions, half documents."""
    return rng.choice((chat, string))(rng, pictures)


def sketches(rng: random.Random) -> Pictures:
    """A few sketches to speak about."""
    of_one = [sketch(rng, 1)]
    return Pictures(of_one, [sketch(rng, 2)], of_one)


SOURCES: dict[str, Callable[[random.Random, Pictures], Record]] = {
    "text": text,
    "text_chat": text_chat,
    "classification": classification,
    "captions": caption,
    "strings": string,
    "chat": chat,
    "heldout": heldout,
}
"""Dataset name -> what makes one record of it."""


def turns(question: list[Record], answer: str | list[Record]) -> Record:
    """A record of a question and its answer."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def texts_of(record: Record) -> list[str]:
    """All text of a record, for training a tokenizer."""
    if "text" in record:
        return [record["text"]]
    contents = [record["content"]] if "content" in record else []
    contents += [message["content"] for message in record.get("messages", [])]
    parts: list[str] = []
    for content in contents:
        if isinstance(content, str):
            parts.append(content)
        else:
            parts += [part["text"] for part in content if part["type"] == "text"]
    return parts
